"""What a comparison found: dense, sparse and quantised configurations of one model, measured the same way."""

from __future__ import annotations

import csv
import io
import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from countdown.benchmark.speedup import Speedup
from countdown.config import check_fields
from countdown.errors import ConfigError
from countdown.files import reason, write_text
from countdown.results import write

FORMAT = "countdown-comparison"
VERSION = 4
FILE, TABLE = "comparison.json", "comparison.csv"

# What a configuration is. `dense` is the yardstick, one of each comparison.
KINDS = ("dense", "sparse", "quantised")
# Points of the curve of how often neurons are active.
CURVE = 64
# Fields of cells that older files call otherwise.
_RENAMED = {"ffn_weights_read": "site_weights_read"}


@dataclass(frozen=True)
class Layer:
    """One sparse module on the evaluated text.

    Args:
        name: The module's name.
        target, realised: Share of inactive terms that was wanted and that was found.
        recall, precision, lost: Of the active sets against the exact ones, see `SelectorQuality`; None where the
            it was not judged.
        activity: How often a neuron is active, `CURVE` points of the sorted curve, most active first.
    """

    name: str
    target: float
    realised: float
    recall: float | None = None
    precision: float | None = None
    lost: float | None = None
    activity: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Quality:
    """What a configuration costs on the evaluated text.

    Args:
        tokens: Scored tokens.
        perplexity: exp of the mean negative log-likelihood.
        loss: Rise of perplexity over the dense model's, as a share of it: 0.02 for 2%.
        loss_interval: 95% of `loss`, by resampling windows, dense and this one paired.
        kl: Mean KL(dense ‖ this), in nats.
        top1: Share of tokens for which both put the same token first.
        realised_sparsity: Share of inactive terms; None unless sparse.
        layers: By module; empty unless sparse.
        window_nll: Mean negative log-likelihood of each window, in nats: what intervals are made from.
    """

    tokens: int
    perplexity: float
    loss: float
    loss_interval: tuple[float, float]
    kl: float
    top1: float
    realised_sparsity: float | None = None
    layers: list[Layer] = field(default_factory=list)
    window_nll: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, found: dict[str, Any]) -> Quality:
        """Return what `asdict` took apart."""
        low, high = found["loss_interval"]
        layers = [Layer(**layer) for layer in found["layers"]]
        return cls(**found | {"loss_interval": (low, high), "layers": layers})


@dataclass(frozen=True)
class Speed:
    """How fast a configuration decodes one sequence on this machine.

    Args:
        tokens_per_s: Of the decode loop.
        speedup: Over the dense model, the median over rounds in which the two took turns; see `benchmark.speedup`.
        floor_us: Time of a token if its weight bytes moved at the bandwidth measured beside, in µs.
        split_us: µs of a token in `ffn`, `attention_linears`, `head` and `rest`; empty where it is not known.
        backend: What computed it, as `status` names it.
        interval: 95% of `speedup`; None in files of versions that measured none.
    """

    tokens_per_s: float
    speedup: float
    floor_us: float
    split_us: dict[str, float] = field(default_factory=dict)
    backend: str = ""
    interval: tuple[float, float] | None = None

    @property
    def dense_beside(self) -> float:
        """Tokens/s of the dense model in the same rounds."""
        return self.tokens_per_s / self.speedup

    @property
    def gain(self) -> Speedup:
        """The speed-up and its interval, which is no wider than itself where none was measured."""
        return Speedup(self.speedup, *(self.interval or (self.speedup, self.speedup)))

    @classmethod
    def parse(cls, found: dict[str, Any]) -> Speed:
        """Return what `asdict` took apart, without parts of a token that are no times."""
        interval, split = found.get("interval"), found["split_us"]
        told = all(part >= 0 for part in split.values())
        low_high = None if interval is None else (interval[0], interval[1])
        return cls(**found | {"interval": low_high, "split_us": split if told else {}})


@dataclass(frozen=True)
class TaskResult:
    """What a configuration scores on a task of lm-eval, by one metric, on the same documents as the dense model.

    Args:
        task: As lm-eval names it.
        metric: Likewise, with its filter where there is one: `acc`, `exact_match, strict-match`.
        documents: How many were scored.
        value: The metric.
        stderr: Its standard error, s/√n over documents. None for metrics that are not means over documents, as
            perplexity, and for a single document.
        difference: value − that of the dense model.
        difference_interval: 95% of `difference`, dense and this one paired by document; see `mean_interval`. None
            where `stderr` is, and for two documents.
    """

    task: str
    metric: str
    documents: int
    value: float
    stderr: float | None
    difference: float
    difference_interval: tuple[float, float] | None

    @classmethod
    def parse(cls, found: dict[str, Any]) -> TaskResult:
        """Return what `asdict` took apart."""
        ends = found["difference_interval"]
        return cls(**found | {"difference_interval": None if ends is None else (ends[0], ends[1])})

    def record(self) -> dict[str, Any]:
        """Return the numbers flat, by names that say of which task and metric they are: `piqa/acc_stderr`."""
        low, high = self.difference_interval or (None, None)
        numbers = {"": self.value, "_stderr": self.stderr, "_difference": self.difference}
        numbers |= {"_difference_low": low, "_difference_high": high, "_documents": self.documents}
        return {f"{self.task}/{self.metric}{name}": number for name, number in numbers.items()}


@dataclass(frozen=True)
class Sample:
    """What a configuration wrote, greedily.

    Args:
        tokens: Token ids.
        pieces: Each token as text; joined they are the answer.
    """

    tokens: list[int]
    pieces: list[str]


@dataclass(frozen=True)
class Cell:
    """One configuration and what was measured of it.

    Args:
        label: Short, unique in a comparison: `dense`, `m-countdown + rms at 0.7`, `int4`.
        kind: One of `KINDS`.
        settings: What made it: of a sparse one its recipe's record (method, weighting, decision, allocation, bits).
        sparsity: Target share of inactive terms; None unless sparse.
        weights_read: Share of the dense model's weight bytes that a decoded token reads (whole token: FFNs,
            attention, head).
        site_weights_read: The same, of the modules that it makes sparse (of others, the FFNs).
        quality, speed, sample: What was measured; None where it was not wanted, or failed.
        tasks: By task and metric; likewise empty.
        error: One line, where it failed.
    """

    label: str
    kind: str
    settings: dict[str, Any]
    sparsity: float | None
    weights_read: float | None = None
    site_weights_read: float | None = None
    quality: Quality | None = None
    speed: Speed | None = None
    sample: Sample | None = None
    tasks: list[TaskResult] = field(default_factory=list)
    error: str | None = None

    @property
    def doubt(self) -> str | None:
        """Why its speed-up is not to be relied on; None where it is, or there is none."""
        if self.speed is None or self.kind == "dense":
            return None
        return self.speed.gain.doubt(self.weights_read and 1 / self.weights_read)

    @classmethod
    def parse(cls, found: dict[str, Any]) -> Cell:
        """Return what `asdict` took apart."""
        parsers: dict[str, Any] = {
            "quality": Quality.parse,
            "speed": Speed.parse,
            "sample": lambda part: Sample(**part),
            "tasks": lambda part: [TaskResult.parse(result) for result in part],
        }
        fields = {_RENAMED.get(name, name): value for name, value in found.items()}
        return cls(**{name: parsers[name](v) if v and name in parsers else v for name, v in fields.items()})

    def scored(self, task: str, metric: str) -> TaskResult | None:
        """Return what it scores on a task by a metric; None where that is not known."""
        return next((one for one in self.tasks if (one.task, one.metric) == (task, metric)), None)

    def record(self) -> dict[str, Any]:
        """Return the numbers flat, the same keys for every cell but for those of tasks."""
        quality, speed = self.quality, self.speed
        low, high = quality.loss_interval if quality else (None, None)
        return {
            "label": self.label,
            "kind": self.kind,
            "method": self.settings.get("method"),
            "weighting": self.settings.get("weighting"),
            "decision": self.settings.get("decision"),
            "allocation": self.settings.get("allocation"),
            "sparsity": self.sparsity,
            "realised_sparsity": quality and quality.realised_sparsity,
            "weights_read": self.weights_read,
            "site_weights_read": self.site_weights_read,
            "tokens": quality and quality.tokens,
            "perplexity": quality and quality.perplexity,
            "loss": quality and quality.loss,
            "loss_low": low,
            "loss_high": high,
            "kl": quality and quality.kl,
            "top1": quality and quality.top1,
            "tokens_per_s": speed and speed.tokens_per_s,
            "dense_tokens_per_s": speed and speed.dense_beside,
            "speedup": speed and speed.speedup,
            "speedup_low": speed and speed.interval and speed.interval[0],
            "speedup_high": speed and speed.interval and speed.interval[1],
            "unreliable": self.doubt,
            "floor_us": speed and speed.floor_us,
            "backend": speed and speed.backend,
            "error": self.error,
            **{name: number for result in self.tasks for name, number in result.record().items()},
        }


@dataclass(frozen=True)
class Recommendation:
    """Which configuration to take.

    Args:
        label: Of its cell.
        reason: One or two sentences with the numbers that decided.
        expected_loss: Loss on the evaluated text.
        interval: Where the loss on other windows of that text lies with 95% probability; see `intervals`.
        confirmed_loss: On text that no decision saw; None where there was none left.
        confirmed: Whether that lies in the interval.
    """

    label: str
    reason: str
    expected_loss: float
    interval: tuple[float, float]
    confirmed_loss: float | None = None
    confirmed: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """All that was found.

    Args:
        meta: Command, date, hardware, versions as in every results file; besides `model`, `wish` (what was asked for,
            in words), `text`, `calibration` (source, hash), `windows`, `window_tokens`, `context`, `new_tokens`,
            `dtype`, `device`, `bandwidth` (bytes/s), `prompt`, `tasks` (by name, what its scores depend on besides
            the model), `caveats` (list of sentences that must be shown), and `rough` (whether it was made in a
            hurry), `this_run_took_s` (seconds of the run that wrote it: without what earlier runs had measured) and
            `identity`: what comparisons must share to be put together.
        cells: Dense first.
        recommendation: None where nothing fits what was asked for.
    """

    meta: dict[str, Any]
    cells: list[Cell]
    recommendation: Recommendation | None = None

    @property
    def rough(self) -> bool:
        """Whether it was made quickly rather than well."""
        return bool(self.meta.get("rough"))

    def records(self) -> list[dict[str, Any]]:
        """Return one flat record for each cell, the same keys for all, as `pandas.DataFrame` takes them."""
        found = [{"model": self.meta.get("model")} | cell.record() for cell in self.cells]
        keys = dict.fromkeys(key for record in found for key in record)
        return [dict.fromkeys(keys) | record for record in found]

    def metrics(self) -> list[tuple[str, str]]:
        """Return the tasks and metrics that were scored, in their order."""
        return list(dict.fromkeys((one.task, one.metric) for cell in self.cells for one in cell.tasks))

    def cell(self, label: str) -> Cell:
        """Return the cell of this label.

        Raises:
            ConfigError: There is none.
        """
        for cell in self.cells:
            if cell.label == label:
                return cell
        raise ConfigError(f"no cell is called '{label}'; there are: {', '.join(cell.label for cell in self.cells)}.")

    def document(self) -> dict[str, Any]:
        """Return what a file holds: a results file, and the cells as they are."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "meta": self.meta,
            "records": self.records(),
            "cells": [asdict(cell) for cell in self.cells],
            "recommendation": self.recommendation and asdict(self.recommendation),
        }

    def save(self, folder: str | Path) -> Path:
        """Write `comparison.json` and `comparison.csv` into a folder, over those that are there; return the folder.

        Raises:
            AccidentError: They cannot be written.
        """
        write(Path(folder) / FILE, self.document())
        write_text(Path(folder) / TABLE, self.table())
        return Path(folder)

    def table(self) -> str:
        """Return the records as CSV, a row for each cell."""
        records, lines = self.records(), io.StringIO()
        writer = csv.DictWriter(lines, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return lines.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a comparison from its file or the folder of it.

        Raises:
            ConfigError: There is none, it is damaged, or a newer countdown wrote it.
        """
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        try:
            return cls._parse(json.loads(file.read_text(encoding="utf-8-sig")))
        except FileNotFoundError as error:
            raise ConfigError(f"{file} does not exist; make it with: countdown compare MODEL -o FOLDER") from error
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {reason(error)}.") from error
        except ConfigError as error:
            raise ConfigError(f"{file} cannot be read as a comparison: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            again = shlex.join(["-o", str(file.parent), "--overwrite"])
            raise ConfigError(
                f"{file} is damaged, or no comparison ({type(error).__name__}: {error}); make it again, which measures "
                f"nothing twice: countdown compare MODEL {again}"
            ) from error

    @classmethod
    def _parse(cls, found: dict[str, Any]) -> Comparison:
        if found["format"] != FORMAT:
            raise ConfigError(f"format is {found['format']!r}, expected '{FORMAT}'.")
        if found["version"] > VERSION:
            raise ConfigError(f"its version is {found['version']}, this countdown reads up to {VERSION}: upgrade it.")
        check_fields("it", found, ("format", "version", "meta", "records", "cells", "recommendation"))
        advice = found["recommendation"]
        if advice is not None:
            low, high = advice["interval"]
            advice = Recommendation(**advice | {"interval": (low, high)})
        return cls(dict(found["meta"]), [Cell.parse(cell) for cell in found["cells"]], advice)
