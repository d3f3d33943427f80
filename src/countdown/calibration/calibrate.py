"""Calibration from end to end: a model and a text in, a profile out."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from countdown.autocast import without_autocast
from countdown.calibration.passes import PASSES, Assignment, Run
from countdown.config import CALIBRATION_TOKENS
from countdown.errors import ConfigError, TextError, UnsupportedModelError
from countdown.loading import check_context, check_known, context_of, window_length
from countdown.methods import Method
from countdown.modules import check_dense
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe, match
from countdown.sites import Site, check_untouched, find_sites
from countdown.sites.fingerprint import structure, weight_sample
from countdown.text import WINDOW, Text, as_texts, unpadded, windows
from countdown.wrappers import base_model

Texts = str | Text | Iterable[str | Text] | Mapping[str, Any]


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    config: Method | Recipe,
    *,
    tokens: int = CALIBRATION_TOKENS,
    window: int | None = None,
    progress: bool = True,
) -> Profile:
    """Estimate what a method needs and return it as a profile.

    Activations are streamed and not kept: memory does not grow with `tokens`. Under `torch.autocast` it computes as
    outside of it.

    Args:
        model: A dense causal language model of transformers, in eval mode. It is left as it was.
        tokenizer: Its tokenizer.
        texts: Text unlike the one evaluated on. Several strings are joined by newlines; of several loaded by
            `load_text`, each gives its share of the tokens, which makes thresholds hold on more kinds of text. Or a
            batch as tokenizers return it, `input_ids` and `attention_mask` `[n, length]`: then every sequence is
            read, without its padding. A method that estimates nothing reads none of it.
        config: The method, e.g. `countdown.method("m-countdown", sparsity=0.7)`, or a recipe of several.
        tokens: How many tokens of text to read, rounded down to whole windows; at least one.
        window: Tokens in a window. [512, or the model's context where that is shorter]
        progress: Show progress on stderr.

    Returns:
        A profile. It holds thresholds for every sparsity, so another one needs no new calibration; they are
        estimated on more text at the sparsity of `config` than at others.

    Raises:
        UnsupportedModelError: The model has no gated FFNs, is sparsified already, or is in training mode.
        ConfigError: Too few tokens asked for, or a recipe, window or tokenizer that does not fit the model.
        TextError: The text is too short, or no text.
        CountdownError: Activations are not finite.

    Example:
        text = countdown.load_text("python-docs", "calibration")
        profile = countdown.calibrate(model, tokenizer, text, countdown.method("m-countdown", weighting="rms"))
    """
    return calibrate_all(model, tokenizer, texts, [config], tokens=tokens, window=window, progress=progress)[0]


@without_autocast()
def calibrate_all(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    configs: Sequence[Method | Recipe],
    *,
    tokens: int = CALIBRATION_TOKENS,
    window: int | None = None,
    progress: bool = True,
) -> list[Profile]:
    """Calibrate several methods or recipes. As `calibrate`, a profile for each."""
    recipes = [Recipe.of(config) for config in configs]
    model = base_model(model)
    check_dense(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} has an encoder, and calibration reads text alone.")
    sequences: list[Tensor] = []
    if any(recipe.reads_text for recipe in recipes):
        texts = texts if isinstance(texts, Mapping) else as_texts(texts)
        sequences = calibration_sequences(tokenizer, texts, tokens, window_length(context_of(model.config), window))
        check_context(model, max(len(sequence) for sequence in sequences))
        check_known(model, sequences)
    read: dict[bool, tuple[Texts, list[Tensor]]] = {True: (texts, sequences), False: ({}, [])}
    return [_calibrate(model, *read[recipe.reads_text], recipe, progress) for recipe in recipes]


def calibration_sequences(tokenizer: Any, texts: Texts, tokens: int, window: int = WINDOW) -> list[Tensor]:
    """Return the sequences that `calibrate` reads, each int64 `[length]`, or raise its errors about text.

    Windows of a text are spread evenly over it: it may be of many kinds from its beginning to its end.
    """
    if isinstance(texts, Mapping):
        return unpadded(texts)
    loaded = _loaded(texts)
    count = tokens // (window * max(len(loaded), 1))
    if count < 1:
        raise ConfigError(f"tokens is {tokens}, expected at least one window of {window} for each text.")
    if not loaded:
        return _spread(windows(tokenizer, texts, at_least=count, length=window), count)
    by_text = [_spread(windows(tokenizer, text, at_least=count, length=window), count) for text in loaded]
    # Two at a time, because the sparse pass runs every other sequence at the target.
    pairs = [rows[start : start + 2] for start in range(0, count, 2) for rows in by_text]
    return [row for pair in pairs for row in pair]


def _spread(rows: Tensor, count: int) -> list[Tensor]:
    return list(rows[torch.arange(count, dtype=torch.int64, device="cpu") * len(rows) // count])


def _loaded(texts: Texts) -> list[Text]:
    """Return the texts that say where they come from; none for strings."""
    if isinstance(texts, Mapping):
        return []
    given = as_texts(texts)
    found = [text for text in given if isinstance(text, Text)]
    if found and len(found) < len(given):
        raise TextError("texts mixes strings with texts of load_text; give one kind.")
    return found


def _calibrate(model: nn.Module, texts: Texts, sequences: list[Tensor], recipe: Recipe, progress: bool) -> Profile:
    sites = find_sites(model, [entry.method.kind for entry in recipe.entries])
    owners = match(
        [(entry.pattern, entry.method.kind) for entry in recipe.entries], [(site.name, site.kind) for site in sites]
    )
    for place, entry in enumerate(recipe.entries):
        entry.method.check_sites([name for name, owner in owners.items() if owner == place])
    methods = {name: recipe.entries[owner].method for name, owner in owners.items()}
    assigned = [
        Assignment(site, found.at(site.name, found.sparsity))
        for site in sites
        if (found := methods.get(site.name)) is not None
    ]
    for one in assigned:
        check_untouched(one.site)
    run = Run(model, sequences, _shuffled(sequences, _loaded(texts)), recipe, assigned, owners, progress)
    wanted = {name for one in assigned for name in one.method.passes()}
    passes = sorted((PASSES.get(name) for name in wanted), key=lambda pass_: pass_.rank)
    run.readings = sum(pass_.readings(run) for pass_ in passes)
    for pass_ in passes:
        pass_.check(run)
    for pass_ in passes:
        pass_.run(run)
    return Profile(
        base_model=_facts(model),
        structure=structure(model, sites),
        samples={site.name: weight_sample(site) for site in sites},
        calibration=_provenance(texts, sequences, sites),
        entries=run.entries,
        allocation=recipe.allocation,
    )


def _shuffled(sequences: list[Tensor], texts: list[Text]) -> list[Tensor]:
    """Return the sequences of several texts in another order, so that a stride takes some of each."""
    if len(texts) < 2:
        return sequences
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu")
    return [sequences[index] for index in order.tolist()]


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
        "texts": described if sequences else [],
        "tokens": sum(len(sequence) for sequence in sequences),
        "window": max((len(sequence) for sequence in sequences), default=0),
        "dtype": str(next(iter(sites[0].sum.weights[0].parts)).dtype).removeprefix("torch."),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
