"""Evolutionary search for R-Sparse's α (arXiv 2504.19449), one for each kind of linear and group of layers.

Differential evolution on the perplexity of a few samples of text, all linears being sparse. What it found is a recipe.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
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
from countdown.calibration.evolution import SearchSettings, evolve
from countdown.errors import OVERWRITE, ConfigError, CountdownError, TextError
from countdown.files import write_text
from countdown.loading import check_context, check_known, context_of
from countdown.memory import batches, logits_at_once, memory_for
from countdown.methods.r_sparse import RSparse
from countdown.modules import check_dense, observed
from countdown.ops.reference import drop_smallest
from countdown.profiles.recipe import Recipe
from countdown.progress import Steps, about, say, track
from countdown.sites import Site, check_untouched, find_sites
from countdown.sites.decoder import stacks
from countdown.sites.fingerprint import structure, weight_sample
from countdown.sums import Sum
from countdown.text import as_texts
from countdown.weights import Weight
from countdown.wrappers import base_model

# Of the text: so many samples of so many tokens are judged on; as many others check what was found.
SAMPLES, LENGTH = 16, 256
# Thresholds of a sample are taken from every so many-th of its tokens.
STRIDE = 4
# Seconds between lines of progress.
BETWEEN_LINES = 30.0
_VERSION = 1


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        best: The method with the α of the best candidate, by name of each linear.
        perplexity: Of the best candidate, on the samples that it was searched on.
        uniform_perplexity: The same where every α is 1.
        check_perplexity: Of the best candidate, on other samples of the text.
        check_uniform_perplexity: The same where every α is 1.
        evaluations: How many candidates were tried.
    """

    best: RSparse
    perplexity: float
    uniform_perplexity: float
    check_perplexity: float
    check_uniform_perplexity: float
    evaluations: int

    @property
    def holds(self) -> bool:
        """Whether what was found is better than α = 1 on the other samples, too."""
        return self.check_perplexity < self.check_uniform_perplexity

    @property
    def method(self) -> RSparse:
        """The best candidate if it holds, else α = 1 everywhere."""
        return self.best if self.holds else replace(self.best, alpha=1.0)

    @property
    def recipe(self) -> Recipe:
        """The same as a recipe, which can be saved."""
        return Recipe.of(self.method)

    def __str__(self) -> str:
        outcome = "it is taken" if self.holds else "so α = 1 everywhere is taken"
        return (
            f"search: best perplexity {self.perplexity:.4f}, {self.uniform_perplexity:.4f} with α = 1 everywhere; on "
            f"other samples {self.check_perplexity:.4f} and {self.check_uniform_perplexity:.4f}: {outcome}"
        )


@without_autocast()
def search_alpha(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    config: RSparse,
    *,
    settings: SearchSettings | None = None,
    record: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Found:
    """Search α of every linear by differential evolution, for the sparsity of `config`.

    A candidate has an α for each kind of linear (q_proj, say) and group of neighbouring layers. It is judged by the
    perplexity of 16 samples of 256 tokens with all linears sparse, by thresholds that are quantiles of the very
    sample: nothing is calibrated meanwhile. Every α = 1 is among the first candidates. The best candidate and α = 1
    everywhere are then compared on 16 other samples, and the better one is what is found: on few samples a search
    finds what holds on these alone, too. The same seed, model and text give the same result.

    Args:
        model: A dense causal language model of transformers, in eval mode. It is left as it was.
        tokenizer: Its tokenizer.
        texts: Text to calibrate on, as for `calibrate`; never what is evaluated on.
        config: `method("r-sparse", ...)`; its own α does not matter.
        settings: How much is tried. [32 candidates, 5 times]
        record: A file that keeps what was tried: a search that was interrupted goes on from there.
        overwrite: Replace a record of another search.
        progress: Show progress on stderr, with the best so far.

    Raises:
        ConfigError: The method is another one, or the file belongs to another search.
        TextError: The text is too short.
        UnsupportedModelError: See `calibrate`.
        CountdownError: The model's output is not finite.
        AccidentError: Memory runs out, or the file cannot be written.

    Example:
        found = countdown.search_alpha(model, tokenizer, text, countdown.method("r-sparse", sparsity=0.5))
        profile = countdown.calibrate(model, tokenizer, text, found.method)
    """
    if not isinstance(config, RSparse):
        raise ConfigError(f"the search is for α of r-sparse, and {config} has none.")
    settings, base = settings or SearchSettings(), base_model(model)
    check_dense(base)
    samples, others = search_samples(tokenizer, texts, context_of(base.config))
    check_context(base, max(len(one) for one in samples + others))
    check_known(base, samples + others)
    sites = find_sites(base, [config.kind])
    for site in sites:
        check_untouched(site)
    entries = _entries(base, sites, settings.groups)
    tried = _Record.open(record, _identity(base, sites, config, samples, settings), overwrite=overwrite)
    trial = _Trial(base, sites, config, progress)
    batches_, other_batches = trial.batches(samples), trial.batches(others)

    def alphas(candidate: Sequence[float]) -> dict[str, float]:
        return {name: candidate[place] for name, place in entries.items()}

    with trial.running():
        judged = _Judged(lambda candidate: trial.perplexity(alphas(candidate), batches_), tried, settings, progress)
        with tried.kept_on_interrupt():
            best = alphas(evolve(judged, len(set(entries.values())), settings))
        check, uniform = (trial.perplexity(one, other_batches) for one in (best, dict.fromkeys(best, 1.0)))
    method = replace(config, alpha=tuple(best.items()))
    found = Found(method, judged.best, judged.first, check, uniform, settings.evaluations)
    if progress:
        say(str(found))
    return found


def search_samples(tokenizer: Any, texts: Texts, context: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the samples that a search judges on, and those that check what it found; or raise its errors about text.

    Args:
        tokenizer, texts: See `search_alpha`.
        context: The longest that the model takes.

    Returns:
        Token ids, each int64 `[256]` or what a batch has. Of a text both are spread over the whole.
    """
    texts = texts if isinstance(texts, Mapping) else as_texts(texts)
    length = min(LENGTH, context or LENGTH)
    found = calibration_sequences(tokenizer, texts, 2 * SAMPLES * length, length)
    scored = [sequence[:length] for sequence in found if len(sequence) > 1][: 2 * SAMPLES]
    if len(scored) < 2:
        raise TextError("the search needs at least two sequences: one to search on, one to check what it found.")
    return scored[::2], scored[1::2]


def _entries(model: nn.Module, sites: Sequence[Site], groups: int) -> dict[str, int]:
    """Return for each linear, by name, which entry of a candidate is its α."""
    layers = {path: (place, len(stack)) for stack in stacks(model) for place, (path, _) in enumerate(stack)}
    places: dict[tuple[str, int], int] = {}
    found: dict[str, int] = {}
    for site in sites:
        path = next(path for path in layers if site.name.startswith(f"{path}."))
        place, count = layers[path]
        key = site.name.removeprefix(f"{path}."), place * min(groups, count) // count
        found[site.name] = places.setdefault(key, len(places))
    return found


class _Trial:
    """The model with all its linears sparse, at any α.

    Args:
        model, sites: What runs.
        config: Sparsity, weighting and decision.
        progress: Show that low ranks are made.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], config: RSparse, progress: bool) -> None:
        self._model: Any = model
        self._sites, self._config = sites, config
        self._norms = {site.name: site.sum.weights[-1].column_norms().float() for site in sites}
        # The widest that any α asks for, of which others are a part.
        widest = replace(config, alpha=0.0).compensation
        assert widest is not None
        self._factors: dict[str, Sequence[Weight]] = {}
        with torch.no_grad(), memory_for(sum(widest.part_bytes(site.sum) for site in sites)):
            for site in track(sites, "low ranks", show=progress):
                self._factors[site.name] = widest.make(site.sum, {})
        self._methods: dict[str, RSparse] = {}

    def batches(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """Return samples in batches that run in one call, each int64 `[samples, length]`."""
        device = next(self._model.parameters()).device
        widest = max(site.terms for site in self._sites)
        return [one.to(device) for one in batches(samples, device, terms=widest, logits=_logit_bytes(self._model))]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context, the model's linears are sparse, and `perplexity` can be called."""
        with torch.inference_mode(), observed(self._model, self._sites, self._active, self._added):
            yield

    def perplexity(self, alphas: Mapping[str, float], batches_: Sequence[Tensor]) -> float:
        """Return exp of the mean negative log-likelihood of samples; infinite where a logit is not finite.

        Args:
            alphas: Of every linear, by name.
            batches_: Token ids, each int64 `[samples, length]`.
        """
        self._methods = {name: replace(self._config, alpha=alpha) for name, alpha in alphas.items()}
        total, count = 0.0, 0
        for batch in batches_:
            logits = self._model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = batch[:, 1:].flatten()
            step = logits_at_once(logits)
            pairs = zip(logits.split(step), targets.split(step), strict=True)
            total += sum(float(F.cross_entropy(some.float(), of, reduction="sum")) for some, of in pairs)
            count += len(targets)
        return math.exp(min(total / count, 700.0)) if math.isfinite(total) else math.inf

    def _active(self, site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        method = self._methods[site.name]
        multipliers = method.multipliers({}, self._norms[site.name])
        sizes = x.abs().float() if multipliers is None else x.abs().float() * multipliers
        if method.decision == "topk":
            return drop_smallest(sizes, method.drop(sum_.terms))
        # Of each sample for itself, so that it does not matter which share a batch.
        return sizes > _quantile(sizes[:, ::STRIDE].flatten(1), method.dropped)[:, None]

    def _added(self, site: Site, x: Tensor, dropped: Tensor) -> Tensor | None:
        compensation = self._methods[site.name].compensation
        if compensation is None:
            return None
        sparse = torch.ones((*x.shape[:-1], 1), dtype=torch.bool, device=x.device)
        return compensation.added(x, dropped, sparse, compensation.cut(site.sum, self._factors[site.name]))


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return the value of each row at or below which this share of it lies, float32 `[rows, 1]`."""
    place = round(share * values.shape[1])
    if 0 < place < values.shape[1]:
        return values.kthvalue(place, dim=1, keepdim=True).values
    return values.new_full((len(values), 1), math.inf if place else -1.0)


def _logit_bytes(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size * 2 * int(next(model.parameters()).element_size())


class _Judged:
    """Judges candidates in turn: those that the record has as they were, others by trying them.

    Args:
        perplexity: Tries one.
        record: What was tried.
        settings: How many there will be.
        progress: Show it on stderr.
    """

    def __init__(
        self, perplexity: Callable[[Sequence[float]], float], record: _Record, settings: SearchSettings, progress: bool
    ) -> None:
        self._perplexity, self._record, self._settings, self._progress = perplexity, record, settings, progress
        self._steps = Steps([""] * (settings.evaluations - min(len(record.values), settings.evaluations)))
        self.first, self.best, self._count = math.nan, math.inf, 0
        self._said = time.monotonic()
        if progress and record.values:
            say(f"search: {len(record.values)} of {settings.evaluations} candidates were tried before")

    def __call__(self, candidate: Sequence[float]) -> float:
        place = self._count
        new = place >= len(self._record.values)
        if new:
            with self._steps.step(""):
                self._record.add(self._perplexity(candidate))
        value = self._record.values[place]
        if place == 0 and math.isinf(value):
            raise CountdownError("with α = 1 everywhere the logits are not finite: nothing can be compared with that.")
        self._count += 1
        self.first = value if place == 0 else self.first
        self.best = min(self.best, value)
        whole = self._count % self._settings.population == 0
        if self._progress and new and (whole or time.monotonic() - self._said > BETWEEN_LINES):
            self._report()
        return value

    def _report(self) -> None:
        self._said = time.monotonic()
        left = "" if self._steps.seconds is None or not self._steps.left else f"; {about(self._steps.seconds)} left"
        generation = math.ceil(self._count / self._settings.population)
        place = f"{self._count} of {self._settings.evaluations} candidates, generation {generation}"
        say(f"search: {place}: best perplexity {self.best:.4f}, {self.first:.4f} with α = 1 everywhere{left}")


class _Record:
    """What candidates of a search gave, in the order in which they were tried, kept in a file if there is one."""

    def __init__(self, path: Path | None, identity: str, values: list[float]) -> None:
        self._path, self._identity, self.values = path, identity, values

    @contextmanager
    def kept_on_interrupt(self) -> Iterator[None]:
        """Within the context, say of an interrupt that nothing is lost."""
        try:
            yield
        except KeyboardInterrupt:
            if self._path is not None and self.values:
                say(f"stopped: {len(self.values)} candidates are kept in {self._path}; the same search goes on there")
            raise

    @classmethod
    def open(cls, path: Path | None, identity: str, *, overwrite: bool) -> _Record:
        """Return what a file has of this search, nothing if there is none; of another, nothing if it may be replaced.

        Raises:
            ConfigError: It is of another search, or no such file.
        """
        if path is None or not path.exists():
            return cls(path, identity, [])
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            of, values = found["search"], [float(value) for value in found["perplexities"]]
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise ConfigError(f"{path} is no record of a search; remove it to search anew.") from error
        if of == identity:
            return cls(path, identity, values)
        if not overwrite:
            raise ConfigError(
                f"{path} is the record of a search with other settings, text or model; {OVERWRITE} searches anew."
            )
        return cls(path, identity, [])

    def add(self, value: float) -> None:
        """Keep one more."""
        self.values.append(value)
        if self._path is not None:
            write_text(self._path, json.dumps({"search": self._identity, "perplexities": self.values}) + "\n")


def _identity(
    model: nn.Module, sites: Sequence[Site], config: RSparse, samples: Sequence[Tensor], settings: SearchSettings
) -> str:
    """Return a hash of all that a search depends on."""
    found = hashlib.sha256(
        json.dumps(
            {
                "version": _VERSION,
                "structure": structure(model, sites),
                "sparsity": config.sparsity,
                "weighting": config.weighting,
                "decision": config.decision,
                "settings": [settings.population, settings.generations, settings.groups, settings.seed],
                "dtype": str(next(model.parameters()).dtype),
            },
            sort_keys=True,
        ).encode()
    )
    for site in sites:
        found.update(weight_sample(site).numpy().tobytes())
    for sample in samples:
        found.update(cast("Any", sample).cpu().numpy().tobytes())
    return found.hexdigest()
