"""Measures cells, each part once: found in the cache, or measured and kept. Nothing loads before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from countdown.benchmark.arm import Arm, Times, free, measure
from countdown.benchmark.timing import Rounds, bandwidth
from countdown.calibration.calibrate import calibrate, calibration_sequences
from countdown.comparison.bootstrap import FEWEST_WINDOWS
from countdown.comparison.cache import Cache, Key
from countdown.comparison.comparison import Cell, Quality, Sample, Speed
from countdown.comparison.effort import USUAL
from countdown.comparison.grid import CALIBRATED_AT, Configuration
from countdown.comparison.identity import environment, model_hash
from countdown.comparison.outcome import Outcome, attempt, checked
from countdown.comparison.quality import DenseLogits, differences, measure_quality, score
from countdown.comparison.quantised import quantise
from countdown.comparison.tasks import Task, results
from countdown.config import check_seed
from countdown.cost import token_bytes
from countdown.errors import AccidentError, ConfigError, UnsupportedModelError
from countdown.evaluation.generation import encode_prompt, generate
from countdown.loading import Source, check_context, load_model, load_tokenizer, resolve_device, resolve_dtype
from countdown.modules import sparse_modules
from countdown.ops.request import requested
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe
from countdown.progress import Steps
from countdown.sites import Site, find_sites
from countdown.sparsify import sparse_twin, status
from countdown.text import BUILT_IN, WINDOW, Text, load_text, windows

PROMPT = "Explain in three sentences why the sky is blue."
SAMPLE_TOKENS = 64
# Of the decode loop: tokens of the prompt, taken from the text, and tokens that are timed.
CONTEXT, NEW_TOKENS = 512, 64


@dataclass(frozen=True)
class Protocol:
    """How every configuration is measured.

    Args:
        text: What to evaluate on: `wikitext2`, `python-docs` (calibration takes their other split) or a file
            (calibration takes `python-docs`).
        text_dir: Of WikiText-2, see `load_text`.
        windows: Windows of 512 tokens to evaluate on, dealt from the whole text at random; as many others, or what is
            left of it, confirm the recommendation.
        tokens: To calibrate on.
        prompt: What every configuration answers.
        dtype, device: See `load_model`.
        seed: Of dealing windows and of resampling them.
        rounds: Of timing.
        tasks: To score every configuration on.

    Raises:
        ConfigError: Too few windows to estimate a spread from.
    """

    text: str = "python-docs"
    text_dir: str | Path | None = None
    windows: int = USUAL.windows
    tokens: int = USUAL.tokens
    prompt: str = PROMPT
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    rounds: Rounds = USUAL.rounds
    tasks: tuple[Task, ...] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.windows < FEWEST_WINDOWS:
            raise ConfigError(f"windows is {self.windows}, expected at least {FEWEST_WINDOWS} to estimate a spread.")
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty.")
        check_seed(self.seed)


@dataclass(frozen=True)
class Measured:
    """What came of a configuration.

    Args:
        cell: What is known of it.
        outcomes: By part.
        now: Whether any of it was measured just now.
    """

    cell: Cell
    outcomes: dict[str, Outcome]
    now: bool


@dataclass(frozen=True)
class Applied:
    """A configuration ready to run.

    Args:
        model: Dense, sparsified or quantised.
        saved: Of a quantised one, see `Quantised`.
    """

    model: nn.Module
    saved: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Yardstick:
    """What the speeds of a session are measured against: bytes/s of the memory, and the dense model's speed.

    Args:
        bandwidth: See `Bandwidth.floor`.
        dense: What was measured of the dense model.
        times: And each of its rounds.
        beside: The dense model in the loop, which others take turns with; None where it is timed once.
    """

    bandwidth: float
    dense: dict[str, Any]
    times: Times
    beside: Arm | None


class Session:
    """A model and what its configurations are measured with.

    Args:
        source: Where the model comes from.
        protocol: How to measure.
        cache: Where measurements are kept.
        speed: Measure speed, too.
        progress: Show progress on stderr.
        say: Called with a line at the start of each step.

    Raises:
        ConfigError, TextError: What is wrong with the settings or the texts.
    """

    def __init__(
        self,
        source: Source,
        protocol: Protocol,
        cache: Cache,
        *,
        speed: bool = True,
        progress: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        requested()  # a backend that does not exist is said before the model loads
        resolve_dtype(protocol.dtype, source)
        self.source, self.protocol, self.cache = source, protocol, cache
        self.progress, self.say = progress, say
        self._profiles: dict[Recipe, Profile] = {}
        self.device = resolve_device(protocol.device)
        self.text = load_text(protocol.text, "evaluation", text_dir=protocol.text_dir)
        other = protocol.text if protocol.text in BUILT_IN else "python-docs"
        self.calibration: Text = load_text(other, "calibration", text_dir=protocol.text_dir)
        self._tasks = {f"task {task.name}": task for task in protocol.tasks}
        self._measure: dict[str, Callable[[Configuration, Applied], dict[str, Any]]] = {
            "quality": self._quality,
            **({"speed": self._speed} if speed else {}),
            "sample": self._sample,
            **{part: partial(self._task, part) for part in self._tasks},
        }

    # What measurements depend on

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What two comparisons must share to be put together."""
        return {
            "model": self.source.label,
            "weights": model_hash(self.source),
            "text": self.text.sha256,
            "calibration text": self.calibration.sha256,
            "calibration tokens": self.protocol.tokens,
            "windows": self.protocol.windows,
            "prompt": self.protocol.prompt,
            "seed": self.protocol.seed,
            **environment(self.device, self.protocol.dtype),
        }

    def _key(self, part: str, configuration: Configuration | None = None) -> dict[str, Any]:
        """Return all that a part of a cell depends on."""
        key: dict[str, Any] = {"part": part} | self.identity
        del key["model"]  # a name
        if part in ("speed", "profile", "sample", *self._tasks):
            del key["windows"]
        if part != "sample":
            del key["prompt"]
        if part in ("sample", "profile", *self._tasks):
            del key["text"]
        if configuration is not None:
            key["configuration"] = configuration.settings(self.device)
        if part in self._tasks:
            key["task"] = self._tasks[part].settings
        rounds = self.protocol.rounds
        sizes: dict[str, list[float]] = {
            "speed": [CONTEXT, NEW_TOKENS, rounds.fewest, rounds.most, rounds.most_s],
            "sample": [SAMPLE_TOKENS],
        }
        return key | {"sizes": sizes.get(part, [WINDOW])}

    # What is loaded

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.source)

    @cached_property
    def _windows(self) -> tuple[Tensor, Tensor]:
        """The windows to evaluate on, and the others, dealt at random."""
        every = windows(self._tokenizer, self.text.content, at_least=self.protocol.windows)
        order = torch.randperm(
            len(every), generator=torch.Generator().manual_seed(self.protocol.seed), dtype=torch.int64, device="cpu"
        )
        count = self.protocol.windows
        return every[order[:count]], every[order[count : 2 * count]]

    @cached_property
    def _model(self) -> Any:
        # What is wrong with the texts shows before the model loads.
        evaluated, _ = self._windows
        calibration_sequences(self._tokenizer, self.calibration, self.protocol.tokens)
        self.say(f"loading {self.source.label}")
        torch.manual_seed(self.protocol.seed)
        model = load_model(self.source, dtype=self.protocol.dtype, device=self.protocol.device)
        check_context(model, evaluated.shape[1])
        return model

    @cached_property
    def _token_bytes(self) -> int:
        return token_bytes(self._model, ()).total

    def _sites(self, configuration: Configuration) -> list[Site]:
        """Return the sites that a configuration makes sparse; of what makes none, those that others would."""
        try:
            return find_sites(self._model, configuration.kinds)
        except UnsupportedModelError:
            if configuration.recipe is None:
                return []
            raise

    @cached_property
    def _dense(self) -> DenseLogits:
        return DenseLogits(self._model, self._windows[0])

    @cached_property
    def _yardstick(self) -> Yardstick | Exception:
        """What speeds are measured against, or why none are."""
        self.say("measuring bandwidth and dense speed")
        try:
            rate = bandwidth(self.device).floor
            arm = self._arm(self._model, split=True)
            times, _ = measure({"dense": arm}, rounds=self.protocol.rounds)
            beside = arm.alone() if self.device.type == "cpu" else None
            return Yardstick(rate, arm.record(times["dense"], times["dense"]), times["dense"], beside)
        except Exception as error:
            return error

    # What is asked for

    def facts(self) -> dict[str, Any]:
        """Return what only the loaded model and tokenizer can tell: dtype, and how many windows are left to confirm."""
        key = self._key("facts")
        found = self.cache.get(key, dict)
        if found is None:
            dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
            found = {"dtype": dtype, "others": len(self._windows[1])}
            self._keep(self.cache.put, key, found)
        return found

    def cells(self, plan: Sequence[Configuration]) -> Iterator[Measured]:
        """Yield what comes of each configuration, dense first. What fails is said in its cell, and does not raise."""
        stored = {one.label: {part: self._stored(part, one) for part in self._measure} for one in plan}
        kinds = _kinds([one for one in plan if None in stored[one.label].values()])
        steps = Steps(list(kinds.values()))
        dense: dict[str, Outcome] = {}
        for configuration in plan:
            label = configuration.label
            found = {part: outcome for part, outcome in stored[label].items() if outcome is not None}
            if label in kinds:
                self.say(f"measuring {label} ({steps})")
                with steps.step(kinds[label]):
                    self._complete(configuration, found)
            dense = dense or found
            yield Measured(self._cell(configuration, found, dense), found, label in kinds)

    def profile(self, configuration: Configuration) -> Profile:
        """Return the profile of a sparse configuration, at its sparsity.

        Raises:
            CountdownError: See `calibrate`.
        """
        assert configuration.recipe is not None
        recipe = configuration.recipe.with_settings(sparsity=CALIBRATED_AT)
        if recipe not in self._profiles:
            key = self._key("profile") | {"recipe": recipe.record()}
            profile = self.cache.get_profile(key)
            if profile is None:
                profile = self._calibrated(recipe)
                self._keep(self.cache.put_profile, key, profile)
            self._profiles[recipe] = profile
        return self._profiles[recipe].with_settings(sparsity=configuration.sparsity)

    def confirm(self, configuration: Configuration) -> list[float]:
        """Return, for windows that no decision saw, the differences to the dense model; see `quality.differences`.

        Raises:
            CountdownError: It cannot be measured.
        """
        key = self._key("confirmation", configuration)
        found = self.cache.get(key, lambda value: [float(d) for d in value])
        if found is None:
            self.say(f"confirming {configuration.label} on other windows")
            with self._applied(configuration) as applied:
                dense = DenseLogits(self._model, self._windows[1])
                found = differences(score(applied.model, dense, label=configuration.label, progress=self.progress))
            self._keep(self.cache.put, key, found)
        return found

    # How it is measured

    def _calibrated(self, recipe: Recipe) -> Profile:
        tokens, progress = self.protocol.tokens, self.progress
        made = calibrate(self._model, self._tokenizer, self.calibration, recipe, tokens=tokens, progress=progress)
        return made.with_name(self.source.label)

    def _keep(self, put: Callable[[Key, Any], None], key: Key, found: Any) -> None:
        """Put something into the cache. What cannot be kept is good for this comparison all the same."""
        try:
            put(key, found)
        except AccidentError as error:
            self.say(f"not kept for another run: {error}")

    def _stored(self, part: str, configuration: Configuration) -> Outcome | None:
        return self.cache.get(self._key(part, configuration), lambda value: checked(part, Outcome(**value)))

    def _complete(self, configuration: Configuration, found: dict[str, Outcome]) -> None:
        """Measure the parts that `found` lacks, and put each there and into the cache as soon as it is known."""
        # What fails here is wrong with the model or the texts, not with a configuration.
        _ = self._sites(configuration)
        missing = [part for part in self._measure if part not in found]

        def measure_all() -> dict[str, Any]:
            with self._applied(configuration) as applied:
                for part in missing:
                    found[part] = attempt(partial(self._measure[part], configuration, applied))
                    self._keep_part(part, configuration, found)
            return {}

        failed = attempt(measure_all)
        free()
        for part in missing:
            if part not in found:
                found[part] = failed
                self._keep_part(part, configuration, found)

    def _keep_part(self, part: str, configuration: Configuration, found: Mapping[str, Outcome]) -> None:
        # The machine may be quieter next time.
        doubted = part == "speed" and self._cell(configuration, found).doubt is not None
        if found[part].final and not doubted:
            self._keep(self.cache.put, self._key(part, configuration), asdict(found[part]))

    @contextmanager
    def _applied(self, configuration: Configuration) -> Iterator[Applied]:
        """Within the context, the model as the configuration has it."""
        if configuration.recipe is not None:
            yield Applied(sparse_twin(self._model, self.profile(configuration)))
        elif configuration.scheme is not None:
            made = quantise(self._model, configuration.scheme)
            yield Applied(made.model, made.saved)
        else:
            yield Applied(self._model)

    def _quality(self, configuration: Configuration, applied: Applied) -> dict[str, Any]:
        quality = measure_quality(
            applied.model, self._dense, label=configuration.label, seed=self.protocol.seed, progress=self.progress
        )
        sparse = status(applied.model) if sparse_modules(applied.model) else []
        shares = {site.name: site.weights_read or 0.0 for site in sparse}
        whole, own = self._read(configuration, applied, shares)
        return {"quality": asdict(quality), "weights_read": whole, "site_weights_read": own}

    def _speed(self, configuration: Configuration, applied: Applied) -> dict[str, Any]:
        yardstick = self._yardstick
        if isinstance(yardstick, Exception):
            raise yardstick
        found = yardstick.dense if configuration.kind == "dense" else self._timed(configuration, applied, yardstick)
        read, _ = self._read(configuration, applied, found.get("weights_read_by_site", {}))
        speed = Speed(
            tokens_per_s=found["tokens_per_s"],
            speedup=found["speedup"],
            floor_us=read * self._token_bytes / yardstick.bandwidth * 1e6,
            split_us=found["split_us"],
            backend=found.get("backend", "torchao" if applied.saved else ""),
            interval=(found["speedup_low"], found["speedup_high"]),
        )
        return {"speed": asdict(speed), "bandwidth": yardstick.bandwidth}

    def _timed(self, configuration: Configuration, applied: Applied, yardstick: Yardstick) -> dict[str, Any]:
        """Return what the loop measures of a configuration, and against the dense model.

        On a CPU the two take turns, as what else runs on the machine comes and goes. On a GPU, where nobody else runs,
        the dense model is timed once.
        """
        arm = self._arm(applied.model, split=not applied.saved)
        beside = {"dense": yardstick.beside} if yardstick.beside else {}
        label = f"timing {configuration.label}" if self.progress else ""
        times, _ = measure({**beside, "configuration": arm}, rounds=self.protocol.rounds, label=label)
        return arm.record(times["configuration"], times.get("dense", yardstick.times))

    def _arm(self, model: nn.Module, *, split: bool = False) -> Arm:
        # Real text, so that active sets are those of a model at work.
        ids = windows(self._tokenizer, self.text.content).flatten()[:CONTEXT]
        return Arm(model, ids[None].to(self.device), NEW_TOKENS, split=split)

    def _sample(self, configuration: Configuration, applied: Applied) -> dict[str, Any]:
        prompt = encode_prompt(self._tokenizer, self.protocol.prompt)
        found = generate(applied.model, self._tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS)
        return {"sample": asdict(Sample(found.tokens, pieces(self._tokenizer, found.tokens)))}

    def _task(self, part: str, configuration: Configuration, applied: Applied) -> dict[str, Any]:
        task = self._tasks[part]
        self.say(f"scoring {configuration.label} on {task.name}")
        # lm-eval's bars redraw themselves, which only a terminal shows as such.
        bars = self.progress and sys.stderr.isatty()
        return {part: task.score(applied.model, self._tokenizer, progress=bars)}

    def _read(
        self, configuration: Configuration, applied: Applied, shares: Mapping[str, float]
    ) -> tuple[float, float | None]:
        """Return the shares of weight bytes that a token reads, of the whole token's and of those of the sites.

        Args:
            configuration: Whose sites are meant.
            applied: What runs.
            shares: By sparse module, the share of its weights that is read.
        """
        sites = [site for site in self._sites(configuration) if not shares or site.name in shares]
        sizes = {site.name: site.nbytes for site in sites}
        saved = dict(applied.saved) | {name: sizes[name] * (1 - share) for name, share in shares.items()}
        inside = tuple(f"{name}." for name in sizes)
        of_sites = sum(bytes_ for name, bytes_ in saved.items() if f"{name}.".startswith(inside))
        own = 1 - of_sites / sum(sizes.values()) if sites else None
        return 1 - sum(saved.values()) / self._token_bytes, own

    def _cell(
        self, configuration: Configuration, outcomes: Mapping[str, Outcome], dense: Mapping[str, Outcome] | None = None
    ) -> Cell:
        """Return a cell of what is known; without what is known of the dense model, it has no scores on tasks."""
        values, beside = _values(outcomes), _values(dense or {})
        scored = [part for part in self._tasks if part in values and part in beside]
        problems = [o.problem for part, o in outcomes.items() if o.problem and not (part == "speed" and o.refused)]
        return Cell(
            label=configuration.label,
            kind=configuration.kind,
            settings=configuration.settings(self.device),
            sparsity=configuration.sparsity,
            weights_read=values.get("weights_read"),
            site_weights_read=values.get("site_weights_read"),
            quality=Quality.parse(values["quality"]) if "quality" in values else None,
            speed=Speed.parse(values["speed"]) if "speed" in values else None,
            sample=Sample(**values["sample"]) if "sample" in values else None,
            tasks=[result for part in scored for result in results(values[part], beside[part])],
            error=problems[0] if problems else None,
        )


def _values(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Return all that was measured, in one."""
    values: dict[str, Any] = {}
    for outcome in outcomes.values():
        values |= outcome.value or {}
    return values


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """Return what each token adds to the text, "" for those that only begin a character."""
    found, written = [], ""
    for count in range(1, len(tokens) + 1):
        text = str(tokenizer.decode(tokens[:count], skip_special_tokens=True))
        # A character of several tokens decodes to U+FFFD until it is complete.
        whole = text if count == len(tokens) or not text.endswith("�") else written
        found.append(whole[len(written) :])
        written = whole
    return found


def _kinds(plan: Sequence[Configuration]) -> dict[str, tuple[str, bool]]:
    """Return by label what makes measuring a configuration long or short: the first of a method is calibrated, too."""
    names = [one.name for one in plan]
    return {one.label: (one.kind, names.index(one.name) == place) for place, one in enumerate(plan)}
