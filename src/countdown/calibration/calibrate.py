"""Calibration from end to end: a model and a text in, a profile out."""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from countdown.calibration.sensitivity import chord, kl_slopes
from countdown.calibration.statistics import Assignment, Moments, second_moments, sketch_sparse
from countdown.calibration.text import WINDOW, Text, unpadded, windows
from countdown.config import CALIBRATION_TOKENS
from countdown.cost import proxy_bytes
from countdown.errors import ConfigError, TextError
from countdown.methods import Method
from countdown.models.find import find_sites
from countdown.models.fingerprint import structure, weight_sample
from countdown.models.loading import check_context
from countdown.models.sites import GatedFFN, Site, check_untouched
from countdown.modules import check_dense
from countdown.ops.proxy import memory_for
from countdown.profile import Entry, Profile, Statistics, allocated, threshold_at
from countdown.progress import track
from countdown.recipe import Recipe, match
from countdown.wrappers import base_model

Texts = str | Text | Sequence[str] | Sequence[Text] | Mapping[str, Any]

# The sparsities at which the sparse pass runs the model, beside the one that was asked for.
LEVELS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
# To allocate, error curves are estimated on every so many-th sequence; their scales in so many rounds over the text,
# as a mean over so many of the last ones, each going this part of the way to what looks best then.
ERROR_STRIDE = 4
ROUNDS = 16
MEMORY = 8
STEP = 0.4


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    config: Method | Recipe,
    *,
    tokens: int = CALIBRATION_TOKENS,
    progress: bool = True,
) -> Profile:
    """Estimate what a method needs and return it as a profile.

    Activations are streamed and not kept: memory does not grow with `tokens`.

    Args:
        model: A dense causal language model of transformers, in eval mode. It is left as it was.
        tokenizer: Its tokenizer.
        texts: Text unlike the one evaluated on. Several strings are joined by newlines; of several loaded by
            `load_text`, each gives its share of the tokens, which makes thresholds hold on more kinds of text. Or a
            batch as tokenizers return it, `input_ids` and `attention_mask` `[n, length]`: then every sequence is
            read, without its padding.
        config: The method, e.g. `countdown.method("m-countdown", sparsity=0.7)`, or a recipe of several.
        tokens: How many tokens of text to read, rounded down to windows of 512; at least one window.
        progress: Show progress on stderr.

    Returns:
        A profile. It holds thresholds for every sparsity, so another one needs no new calibration; they are
        estimated on more text at the sparsity of `config` than at others.

    Raises:
        UnsupportedModelError: The model has no gated FFNs, is sparsified already, or is in training mode.
        ConfigError: Too few tokens asked for, or a recipe that does not fit the model.
        TextError: The text is too short.
        CountdownError: Activations are not finite.
    """
    return calibrate_all(model, tokenizer, texts, [config], tokens=tokens, progress=progress)[0]


def calibrate_all(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    configs: Sequence[Method | Recipe],
    *,
    tokens: int = CALIBRATION_TOKENS,
    progress: bool = True,
) -> list[Profile]:
    """Calibrate several methods or recipes. As `calibrate`, a profile for each."""
    recipes = [Recipe.of(config) for config in configs]
    sequences = calibration_sequences(tokenizer, texts, tokens)
    model = base_model(model)
    check_dense(model)
    check_context(model, max(len(sequence) for sequence in sequences))
    return [_calibrate(model, texts, sequences, recipe, progress) for recipe in recipes]


def calibration_sequences(tokenizer: Any, texts: Texts, tokens: int) -> list[Tensor]:
    """Return the sequences that `calibrate` reads, each int64 `[length]`, or raise its errors about text.

    Windows of a text are spread evenly over it: it may be of many kinds from its beginning to its end.
    """
    if isinstance(texts, Mapping):
        return unpadded(texts)
    loaded = _loaded(texts)
    count = tokens // (WINDOW * max(len(loaded), 1))
    if count < 1:
        raise ConfigError(f"tokens is {tokens}, expected at least one window of {WINDOW} for each text.")
    if not loaded:
        return _spread(windows(tokenizer, texts, at_least=count), count)  # type: ignore[arg-type]
    by_text = [_spread(windows(tokenizer, text.content, at_least=count), count) for text in loaded]
    # Two at a time, because the sparse pass runs every other sequence at the target.
    pairs = [rows[start : start + 2] for start in range(0, count, 2) for rows in by_text]
    return [row for pair in pairs for row in pair]


def _spread(rows: Tensor, count: int) -> list[Tensor]:
    return list(rows[torch.arange(count) * len(rows) // count])


def _loaded(texts: Texts) -> list[Text]:
    """Return the texts that say where they come from; none for strings."""
    if isinstance(texts, str | Mapping):
        return []
    given = [texts] if isinstance(texts, Text) else list(texts)
    found = [text for text in given if isinstance(text, Text)]
    if found and len(found) < len(given):
        raise TextError("texts mixes strings with texts of load_text; give one kind.")
    return found


def _calibrate(model: nn.Module, texts: Texts, sequences: list[Tensor], recipe: Recipe, progress: bool) -> Profile:
    sites = find_sites(model, [entry.method.kind for entry in recipe.entries])
    owners = match(
        [(entry.pattern, entry.method.kind) for entry in recipe.entries], [(site.name, site.kind) for site in sites]
    )
    assigned = [Assignment(site, recipe.entries[owners[site.name]].method) for site in sites if site.name in owners]
    for entry in assigned:
        check_untouched(entry.site)
    assigned = _weighted(model, assigned, sequences, progress)
    found = {entry.site.name: Statistics(entry.weights, importance=entry.importance) for entry in assigned}
    entries = [
        Entry(entry.pattern, entry.method, {name: found[name] for name, owner in owners.items() if owner == index})
        for index, entry in enumerate(recipe.entries)
    ]
    entries = _with_errors(model, entries, assigned, _shuffled(sequences, _loaded(texts)), progress)
    entries = _with_thresholds(model, entries, assigned, sequences, progress)
    return Profile(
        base_model=_facts(model),
        structure=structure(model, sites),
        samples={site.name: weight_sample(site) for site in sites},
        calibration=_provenance(texts, sequences, sites),
        entries=entries,
    )


def _shuffled(sequences: list[Tensor], texts: list[Text]) -> list[Tensor]:
    """Return the sequences of several texts in another order, so that a stride takes some of each."""
    if len(texts) < 2:
        return sequences
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))
    return [sequences[index] for index in order.tolist()]


def _weighted(
    model: nn.Module, assigned: list[Assignment], sequences: list[Tensor], progress: bool
) -> list[Assignment]:
    """Return the assignments with the weights of their indicators, and their proxies."""
    any_moments = any(entry.method.moments() for entry in assigned)
    moments = second_moments(model, assigned, sequences, progress=progress) if any_moments else {}
    with memory_for(sum(proxy_bytes([entry.site], entry.method) for entry in assigned)):
        return [_with_proxy(_with_weights(entry, moments.get(entry.site.name, {})), moments) for entry in assigned]


def _with_weights(entry: Assignment, moments: Mapping[str, Tensor]) -> Assignment:
    if entry.method.weighting == "none":
        return entry
    weights = entry.method.weights(moments, entry.site.column_norms().cpu())
    # Sparse modules compare in float32, so that is what is sketched and stored.
    return replace(entry, weights=None if weights is None else weights.float())


def _with_proxy(entry: Assignment, moments: Moments) -> Assignment:
    if not entry.method.proxy_bits or not isinstance(entry.site, GatedFFN):
        return entry
    importance = moments[entry.site.name]["input"].float()
    return replace(entry, importance=importance, proxy=entry.site.proxy(importance, entry.method.proxy_bits))


def _with_errors(
    model: nn.Module, entries: list[Entry], assigned: list[Assignment], sequences: list[Tensor], progress: bool
) -> list[Entry]:
    """Return the entries, those of global allocation with the estimated errors of their sites.

    A site's estimate is the expected squared error of its output, E Σ c_i²‖w_i‖² over the terms it drops, as a
    function of sparsity, scaled so that at the allocated sparsity it rises as the KL of the whole model does. What
    is allocated moves the scales, so this is repeated.
    """
    owners = [e for e in entries if e.method.allocation == "global" and e.method.sparsity]
    chosen = {name for entry in owners for name in entry.sites}
    if not chosen:
        return entries
    some, schedule = sequences[::ERROR_STRIDE], itertools.repeat(_uniform(assigned)(None))
    sketches = sketch_sparse(
        model, assigned, some, schedule, losses=True, label="errors to allocate by", progress=progress
    )
    judged = [entry for entry in assigned if entry.site.name in chosen]
    local = {entry.site.name: sketches[entry.site.name].errors(entry.site.terms) for entry in judged}
    curves = {entry.site.name: sketches[entry.site.name].thresholds() for entry in assigned}
    sizes = {entry.site.name: entry.site.size for entry in assigned}
    now, scales = _uniform(assigned)(None), dict.fromkeys(chosen, 0.0)
    for round_, some in enumerate(track(_rounds(sequences), "calibrating, effect of each module", show=progress), 1):
        slopes = kl_slopes(model, assigned, some, now, lambda name, k: threshold_at(curves[name], k))
        for name in chosen:
            rise = _rise(local[name], now[name])
            # A mean over the rounds that forgets the first ones, which were made elsewhere.
            scales[name] += ((slopes[name] / rise if rise else 0.0) - scales[name]) / min(round_, MEMORY)
        entries = _updated(entries, "errors", {n: (local[n] * max(scales[n], 0.0)).float() for n in chosen})
        wanted = {name: k for entry in entries for name, k in allocated(entry, sizes).items()}
        now = {name: k + STEP * (wanted[name] - k) for name, k in now.items()}
    return entries


def _rounds(sequences: list[Tensor]) -> list[list[Tensor]]:
    """Return other sequences for each round, each lot spread over the text."""
    count = min(ROUNDS, len(sequences))
    return [sequences[start::count] for start in range(count)]


def _rise(local: Tensor, sparsity: float) -> float:
    """Return the slope of an error curve at a sparsity, over the chord that the slopes of the KL are taken over."""
    low, high = chord(sparsity)
    return (threshold_at(local, high) - threshold_at(local, low)) / (high - low)


def _with_thresholds(
    model: nn.Module, entries: list[Entry], assigned: list[Assignment], sequences: list[Tensor], progress: bool
) -> list[Entry]:
    """Return the entries with the threshold curves of those sites whose method can decide by threshold."""
    wanted = {name for entry in entries if "threshold" in entry.method.decisions for name in entry.sites}
    if not wanted:
        return entries
    sizes = {entry.site.name: entry.site.size for entry in assigned}

    def levels(sparsity: float | None) -> dict[str, float]:
        settings = (e if sparsity is None else replace(e, method=replace(e.method, sparsity=sparsity)) for e in entries)
        return {name: level for entry in settings for name, level in allocated(entry, sizes).items()}

    label = f"thresholds of {'; '.join(entry.method.label for entry in entries)}"
    sketches = sketch_sparse(model, assigned, sequences, _schedule(levels), label=label, progress=progress)
    return _updated(entries, "thresholds", {name: sketches[name].thresholds() for name in wanted})


def _updated(entries: list[Entry], part: str, found: Mapping[str, Tensor]) -> list[Entry]:
    """Return the entries with `found`, by site, as this part of their statistics."""
    return [
        replace(
            entry,
            sites={
                name: replace(old, **{part: found[name]}) if name in found else old for name, old in entry.sites.items()
            },
        )
        for entry in entries
    ]


def _uniform(assigned: Sequence[Assignment]) -> Callable[[float | None], dict[str, float]]:
    return lambda sparsity: {e.site.name: e.method.sparsity if sparsity is None else sparsity for e in assigned}


def _schedule(levels: Callable[[float | None], dict[str, float]]) -> Iterator[dict[str, float]]:
    """Yield the sparsity of every site for each sequence: the targets, and `LEVELS` in turn, alternately."""
    own = levels(None)
    others = [found for level in LEVELS if (found := levels(level)) != own]
    for turn in itertools.count():
        yield own
        # Each round of levels begins one later, so that no level falls in step with texts that take turns.
        yield others[(turn + turn // len(others)) % len(others)]


def _facts(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    name = config.name_or_path
    facts = {
        # A folder's own name: where it lies on this machine says nothing elsewhere.
        "name": Path(name).name if os.path.isdir(name) else name,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": config.model_type,
    }
    return {key: value for key, value in facts.items() if value}


def _provenance(texts: Texts, sequences: list[Tensor], sites: Sequence[Site]) -> dict[str, Any]:
    import transformers

    described = [text.describe() for text in _loaded(texts)] or [{"source": "given"}]
    return {
        "texts": described,
        "tokens": sum(len(sequence) for sequence in sequences),
        "window": max(len(sequence) for sequence in sequences),
        "dtype": str(sites[0].matrices[0].dtype).removeprefix("torch."),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
