"""Calibration from end to end: a model and a text in, a profile out."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from countdown.calibration.statistics import Weights, second_moments, threshold_curves
from countdown.calibration.text import WINDOW, Text, windows
from countdown.config import CALIBRATION_TOKENS
from countdown.errors import ConfigError
from countdown.methods import Method
from countdown.models.ffn import GatedFFN, check_untouched, find_ffns
from countdown.models.fingerprint import structure, weight_sample
from countdown.models.loading import check_context
from countdown.modules import check_dense
from countdown.profile import Entry, Profile, Site


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Text | Sequence[str],
    config: Method,
    *,
    tokens: int = CALIBRATION_TOKENS,
    progress: bool = True,
) -> Profile:
    """Estimate what a method needs and return it as a profile.

    Activations are streamed and not kept: memory does not grow with `tokens`.

    Args:
        model: A dense causal language model of transformers, in eval mode. It is left as it was.
        tokenizer: Its tokenizer.
        texts: Text unlike the one evaluated on; several are joined by newlines.
        config: The method, e.g. `countdown.method("m-countdown", sparsity=0.7)`.
        tokens: How many tokens to read, rounded down to windows of 512; at least one window.
        progress: Show progress on stderr.

    Returns:
        A profile. It holds thresholds for every sparsity, so another one needs no new calibration; they are
        estimated on more text at the sparsity of `config` than at others.

    Raises:
        UnsupportedModelError: The model has no gated FFNs, is sparsified already, or is in training mode.
        ConfigError: Too few tokens asked for.
        TextError: The text is too short.
        CountdownError: Activations are not finite.
    """
    return calibrate_all(model, tokenizer, texts, [config], tokens=tokens, progress=progress)[0]


def calibrate_all(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Text | Sequence[str],
    configs: Sequence[Method],
    *,
    tokens: int = CALIBRATION_TOKENS,
    progress: bool = True,
) -> list[Profile]:
    """Calibrate several methods, sharing the pass that estimates moments. As `calibrate`, a profile for each."""
    ids = calibration_windows(tokenizer, texts, tokens)
    check_dense(model)
    check_context(model, WINDOW)
    ffns = find_ffns(model)
    for ffn in ffns:
        check_untouched(ffn)
    weights = _weights(model, ffns, ids, configs, progress)
    samples = {ffn.name: weight_sample(ffn) for ffn in ffns}
    profiles = []
    for config, weight in zip(configs, weights, strict=True):
        thresholds: Mapping[str, Tensor] = {}
        if "threshold" in config.decisions:
            thresholds = threshold_curves(model, ffns, ids, config, weight, progress=progress)
        sites = {ffn.name: Site(weight[ffn.name], thresholds.get(ffn.name)) for ffn in ffns}
        profiles.append(
            Profile(
                base_model=_base_model(model),
                structure=structure(model, ffns),
                samples=samples,
                calibration=_provenance(texts, ids, ffns),
                entries=[Entry(_pattern(ffns), config, sites)],
            )
        )
    return profiles


def calibration_windows(tokenizer: Any, texts: str | Text | Sequence[str], tokens: int) -> Tensor:
    """Return the windows that `calibrate` reads, int64 `[tokens // 512, 512]`, or raise its errors about text.

    They are spread evenly over the text, which may be of many kinds from its beginning to its end.
    """
    if tokens < WINDOW:
        raise ConfigError(f"tokens is {tokens}, expected at least one window of {WINDOW}.")
    count = tokens // WINDOW
    rows = windows(tokenizer, texts.content if isinstance(texts, Text) else texts, at_least=count)
    return rows[torch.arange(count) * len(rows) // count]


def _weights(
    model: nn.Module, ffns: list[GatedFFN], ids: Tensor, configs: Sequence[Method], progress: bool
) -> list[Weights]:
    names = sorted({name for config in configs for name in config.moments()})
    moments = second_moments(model, ffns, ids, names, progress=progress) if names else {}
    norms = {ffn.name: ffn.column_norms().cpu() for ffn in ffns}
    result: list[Weights] = []
    for config in configs:
        by_site = {ffn.name: config.weights(moments.get(ffn.name, {}), norms[ffn.name]) for ffn in ffns}
        # Sparse FFNs compare in float32, so that is what is sketched and stored.
        result.append({site: None if weight is None else weight.float() for site, weight in by_site.items()})
    return result


def _base_model(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    name = config.name_or_path
    facts = {
        # A folder's own name: where it lies on this machine says nothing elsewhere.
        "name": Path(name).name if os.path.isdir(name) else name,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": config.model_type,
    }
    return {key: value for key, value in facts.items() if value}


def _provenance(texts: str | Text | Sequence[str], ids: Tensor, ffns: list[GatedFFN]) -> dict[str, Any]:
    import transformers

    described = texts.describe() if isinstance(texts, Text) else {"source": "given"}
    return {
        "text": described,
        "tokens": ids.numel(),
        "window": ids.shape[1],
        "dtype": str(ffns[0].linears[0].weight.dtype).removeprefix("torch."),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _pattern(ffns: list[GatedFFN]) -> str:
    """Return `a.*.b` for FFNs named a.0.b, a.1.b, and so on."""
    first, last = ffns[0].name.split("."), ffns[-1].name.split(".")
    return ".".join(one if one == other else "*" for one, other in zip(first, last, strict=True))
