"""Evolutionary search for R-Sparse's α (arXiv 2504.19449), one for each kind of linear and group of layers.

Differential evolution on the perplexity of a few samples of text, all linears being sparse. What it found is a recipe.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from countdown.autocast import without_autocast
from countdown.calibration.calibrate import Texts, calibration_sequences
from countdown.compensation.svd import DroppedSvd
from countdown.errors import AccidentError, ConfigError
from countdown.files import reason, write_text
from countdown.finite import not_finite
from countdown.loading import check_context, check_known
from countdown.memory import batches, logits_at_once, memory_for
from countdown.methods.r_sparse import RSparse
from countdown.modules import check_dense, observed
from countdown.progress import Steps, say
from countdown.sites import Site, check_untouched, find_sites
from countdown.sites.decoder import stacks
from countdown.sites.fingerprint import structure, weight_sample
from countdown.sums import Sum
from countdown.text import as_texts
from countdown.weights import Weight
from countdown.wrappers import base_model

# Of the text: so many samples of so many tokens.
SAMPLES, LENGTH = 16, 256
# Thresholds of a batch are taken from every so many-th token.
SPARED = 4
# Differential evolution: how far a difference moves a candidate, and the share of its entries that move.
MUTATION = CROSSOVER = 0.5
# A new candidate leaves out the low-rank term in this share of its entries; elsewhere α is down to this.
WITHOUT, LOWEST = 0.75, 0.7
# α has so many decimals, so that a recipe says exactly what was tried.
DECIMALS = 3
_VERSION = 1


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        method: The method with the best α, by name of each linear.
        perplexity: On the samples.
        uniform_perplexity: The same where every α is 1.
        evaluations: How many candidates were tried.
    """

    method: RSparse
    perplexity: float
    uniform_perplexity: float
    evaluations: int


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Args:
        population: Candidates at a time; at least 4, of which three make a new one.
        generations: How often the population is tried; the first time as it is drawn. At least 1.
        groups: Into how many groups of neighbours the layers are put; linears of one kind in a group share α.
        seed: Of the random numbers.

    Raises:
        ConfigError: A number is out of range.
    """

    population: int = 32
    generations: int = 5
    groups: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("population", 4), ("generations", 1), ("groups", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} of the search is {value!r}, expected a whole number of {least} or more.")

    @property
    def evaluations(self) -> int:
        """How many candidates are tried."""
        return self.population * self.generations


@without_autocast()
def search(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    config: RSparse,
    *,
    effort: Effort | None = None,
    record: Path | None = None,
    progress: bool = True,
) -> Found:
    """Search α of every linear by differential evolution, for the sparsity of `config`.

    A candidate has an α for each kind of linear (q_proj, say) and group of neighbouring layers. It is judged by the
    perplexity of 16 samples of 256 tokens with all linears sparse, by thresholds that are quantiles of the very
    samples: nothing is calibrated meanwhile. Every α = 1 is among the first candidates, so what is found is no worse on
    the samples. The same seed, model and text give the same result.

    Args:
        model: A dense causal language model of transformers, in eval mode. It is left as it was.
        tokenizer: Its tokenizer.
        texts: Text to calibrate on, as for `calibrate`; never what is evaluated on.
        config: `method("r-sparse", ...)`; its own α does not matter.
        effort: How much is tried. [32 candidates, 5 times]
        record: A file that keeps what was tried: a search that was interrupted goes on from there.
        progress: Show progress on stderr, with the best so far.

    Raises:
        ConfigError: The method is another one, or the file belongs to another search.
        TextError: The text is too short.
        UnsupportedModelError: See `calibrate`.
        CountdownError: The model's output is not finite.
        AccidentError: Memory runs out, or the file cannot be written.

    Example:
        found = countdown.search(model, tokenizer, text, countdown.method("r-sparse", sparsity=0.5))
        profile = countdown.calibrate(model, tokenizer, text, found.method)
    """
    if not isinstance(config, RSparse):
        raise ConfigError(f"the search is for α of r-sparse, and {config} has none.")
    effort, base = effort or Effort(), base_model(model)
    check_dense(base)
    texts = texts if isinstance(texts, Mapping) else as_texts(texts)
    samples = calibration_sequences(tokenizer, texts, SAMPLES * LENGTH, LENGTH)
    check_context(base, LENGTH)
    check_known(base, samples)
    sites = find_sites(base, [config.kind])
    for site in sites:
        check_untouched(site)
    kinds = _kinds(base, sites, effort.groups)
    trial = _Trial(base, sites, config, samples)
    tried = _Record.open(record, _identity(base, sites, config, samples, effort))
    names = [site.name for site in sites]

    def perplexity(candidate: Sequence[float]) -> float:
        return trial.perplexity({name: candidate[kinds[name]] for name in names})

    with trial.running():
        judged = _Judged(perplexity, tried, effort, progress)
        best = evolve(judged, len(set(kinds.values())), effort)
    alphas = tuple((name, best[kinds[name]]) for name in names)
    return Found(replace(config, alpha=alphas), judged.best, judged.first, effort.evaluations)


def evolve(judge: Callable[[Sequence[float]], float], entries: int, effort: Effort) -> list[float]:
    """Return the candidate for which `judge` is smallest, by differential evolution (rand/1/bin).

    Args:
        judge: From a candidate, `entries` numbers from 0 to 1, to what is minimised.
        entries: At least 1.
        effort: How many candidates, how often, and the seed. The first candidate is all ones.
    """
    generator = torch.Generator().manual_seed(effort.seed)
    population = [_drawn(entries, generator) for _ in range(effort.population)]
    population[0] = torch.ones(entries, dtype=torch.float64, device="cpu")
    values = [judge(_numbers(candidate)) for candidate in population]
    for _ in range(1, effort.generations):
        # All of a generation are made from the one before, whichever of its own turn out better.
        trials = [_mutated(population, place, generator) for place in range(effort.population)]
        for place, candidate in enumerate(trials):
            value = judge(_numbers(candidate))
            if value <= values[place]:
                population[place], values[place] = candidate, value
    return _numbers(population[values.index(min(values))])


def _drawn(entries: int, generator: torch.Generator) -> Tensor:
    """Return a random candidate, float64 `[entries]`."""
    left_out, depth = torch.rand(2, entries, generator=generator, dtype=torch.float64, device="cpu")
    return torch.where(left_out < WITHOUT, 1.0, 1 - (1 - LOWEST) * depth).round(decimals=DECIMALS)


def _mutated(population: Sequence[Tensor], place: int, generator: torch.Generator) -> Tensor:
    """Return a candidate with some entries moved to where three others point, float64 `[entries]`."""
    order = torch.randperm(len(population), generator=generator, dtype=torch.int64, device="cpu").tolist()
    base, plus, minus = (population[other] for other in [one for one in order if one != place][:3])
    entries = len(base)
    crossed = torch.rand(entries, generator=generator, dtype=torch.float64, device="cpu") < CROSSOVER
    crossed[int(torch.randint(entries, (), generator=generator, dtype=torch.int64, device="cpu"))] = True
    moved = (base + MUTATION * (plus - minus)).clamp(0, 1).round(decimals=DECIMALS)
    return torch.where(crossed, moved, population[place])


def _numbers(candidate: Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in candidate.tolist()]


def _kinds(model: nn.Module, sites: Sequence[Site], groups: int) -> dict[str, int]:
    """Return for each linear, by name, which entry of a candidate is its α."""
    layers = {path: (place, len(stack)) for stack in stacks(model) for place, (path, _) in enumerate(stack)}
    entries: dict[tuple[str, int], int] = {}
    found: dict[str, int] = {}
    for site in sites:
        path = next(path for path in layers if site.name.startswith(f"{path}."))
        place, count = layers[path]
        key = site.name.removeprefix(f"{path}."), place * min(groups, count) // count
        found[site.name] = entries.setdefault(key, len(entries))
    return found


class _Trial:
    """The model with all its linears sparse, at any α.

    Args:
        model, sites: What runs.
        config: Sparsity and weighting.
        samples: Token ids, each int64 `[length]`.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], config: RSparse, samples: Sequence[Tensor]) -> None:
        self._model: Any = model
        self._sites, self._config = sites, config
        device = next(model.parameters()).device
        self._batches = [
            batch.to(device)
            for batch in batches(samples, device, terms=max(one.terms for one in sites), logits=_logit_bytes(model))
        ]
        self._norms = {site.name: site.sum.weights[-1].column_norms().float() for site in sites}
        # The widest that any α asks for, of which others are a part.
        widest = DroppedSvd(config.sparsity, 0.0)
        with torch.no_grad(), memory_for(sum(widest.part_bytes(site.sum) for site in sites)):
            self._factors: dict[str, Sequence[Weight]] = {site.name: widest.make(site.sum, {}) for site in sites}
        self._methods: dict[str, RSparse] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context, the model's linears are sparse, and `perplexity` can be called."""
        with torch.inference_mode(), observed(self._model, self._sites, self._active, self._added):
            yield

    def perplexity(self, alphas: Mapping[str, float]) -> float:
        """Return exp of the mean negative log-likelihood of the samples.

        Args:
            alphas: Of every linear, by name.
        """
        self._methods = {name: replace(self._config, alpha=alpha) for name, alpha in alphas.items()}
        total, count = 0.0, 0
        for batch in self._batches:
            logits = self._model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = batch[:, 1:].flatten()
            step = logits_at_once(logits)
            pairs = zip(logits.split(step), targets.split(step), strict=True)
            total += sum(float(F.cross_entropy(some.float(), of, reduction="sum")) for some, of in pairs)
            count += len(targets)
        if not math.isfinite(total):
            raise not_finite("the logits are", self._model)
        return math.exp(min(total / count, 700.0))

    def _active(self, site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        method = self._methods[site.name]
        sizes = x.flatten(0, -2).abs().float()
        multipliers = method.multipliers({}, self._norms[site.name])
        sizes = sizes if multipliers is None else sizes * multipliers
        return (sizes > _quantile(sizes[::SPARED], method.dropped)).view(x.shape)

    def _added(self, site: Site, x: Tensor, dropped: Tensor) -> Tensor | None:
        compensation = self._methods[site.name].compensation
        if compensation is None:
            return None
        return compensation.added(x, dropped, compensation.cut(site.sum, self._factors[site.name]))


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return the value at or below which this share of the values lies, float32 `[]`; -1 for none of them."""
    place = round(share * values.numel())
    return values.flatten().kthvalue(place).values if place else values.new_full((), -1.0)


def _logit_bytes(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size * 2 * int(next(model.parameters()).element_size())


class _Judged:
    """Judges candidates in turn: those that the record has as they were, others by trying them.

    Args:
        perplexity: Tries one.
        record: What was tried.
        effort: How many there will be.
        progress: Show it on stderr.
    """

    def __init__(
        self, perplexity: Callable[[Sequence[float]], float], record: _Record, effort: Effort, progress: bool
    ) -> None:
        self._perplexity, self._record, self._effort, self._progress = perplexity, record, effort, progress
        self._steps = Steps([""] * (effort.evaluations - min(len(record.values), effort.evaluations)))
        self.first, self.best, self._count = math.nan, math.inf, 0
        if progress and record.values:
            say(f"search: {len(record.values)} of {effort.evaluations} candidates were tried before")

    def __call__(self, candidate: Sequence[float]) -> float:
        place = self._count
        if place >= len(self._record.values):
            with self._steps.step(""):
                self._record.add(self._perplexity(candidate))
        value = self._record.values[place]
        self._count += 1
        self.first = value if place == 0 else self.first
        self.best = min(self.best, value)
        if self._progress and self._count % self._effort.population == 0:
            self._report()
        return value

    def _report(self) -> None:
        left = "" if not self._steps.left or self._steps.seconds is None else f"; {self._steps}"
        generation = f"generation {self._count // self._effort.population} of {self._effort.generations}"
        say(f"search: {generation}: best perplexity {self.best:.4f}, {self.first:.4f} with α = 1 everywhere{left}")


class _Record:
    """What candidates of a search gave, in the order in which they were tried, kept in a file if there is one."""

    def __init__(self, path: Path | None, identity: str, values: list[float]) -> None:
        self._path, self._identity, self.values = path, identity, values

    @classmethod
    def open(cls, path: Path | None, identity: str) -> _Record:
        """Return what a file has of this search, nothing if there is none.

        Raises:
            ConfigError: It is of another search, or no such file.
        """
        if path is None or not path.exists():
            return cls(path, identity, [])
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            of, values = found["search"], [float(value) for value in found["perplexities"]]
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise ConfigError(
                f"{path} is no record of a search ({reason(error)}); remove it to search anew."
            ) from error
        if of != identity:
            raise ConfigError(
                f"{path} is the record of a search with other settings, text or model; remove it to search anew."
            )
        return cls(path, identity, values)

    def add(self, value: float) -> None:
        """Keep one more."""
        self.values.append(value)
        if self._path is None:
            return
        try:
            write_text(self._path, json.dumps({"search": self._identity, "perplexities": self.values}) + "\n")
        except OSError as error:
            raise AccidentError(f"{self._path} cannot be written: {reason(error)}.") from error


def _identity(
    model: nn.Module, sites: Sequence[Site], config: RSparse, samples: Sequence[Tensor], effort: Effort
) -> str:
    """Return a hash of all that a search depends on."""
    found = hashlib.sha256(
        json.dumps(
            {
                "version": _VERSION,
                "structure": structure(model, sites),
                "sparsity": config.sparsity,
                "weighting": config.weighting,
                "effort": [effort.population, effort.generations, effort.groups, effort.seed],
                "dtype": str(next(model.parameters()).dtype),
            },
            sort_keys=True,
        ).encode()
    )
    for site in sites:
        found.update(weight_sample(site).numpy().tobytes())
    for sample in samples:
        found.update(cast("Any", sample).numpy().tobytes())
    return found.hexdigest()
