"""A comparison made up for tests: 24 configurations with plausible numbers, none of them measured."""

from __future__ import annotations

import math
from dataclasses import replace

from countdown.comparison.comparison import (
    CURVE,
    Cell,
    Comparison,
    Layer,
    Quality,
    Recommendation,
    Sample,
    Speed,
)

DENSE_PERPLEXITY, DENSE_RATE, BLOCKS = 38.8, 79.0, 30
SPARSITIES = (0.3, 0.5, 0.6, 0.7)
# Of each method: label, settings, what it costs, what of its speed it gets, and its selector's recall.
METHODS = (
    ("m-countdown", {"method": "m-countdown", "weighting": "none"}, 4.0, 0.55, 0.78),
    ("m-countdown + rms", {"method": "m-countdown", "weighting": "rms"}, 0.42, 0.54, 0.86),
    ("cats + rms", {"method": "cats", "weighting": "rms"}, 0.55, 0.5, 0.82),
    ("d-proxy", {"method": "d-proxy", "bits": 4}, 0.2, 0.6, 0.95),
    ("teal", {"method": "teal"}, 0.3, 0.0, None),
)
ANSWER = "The sky looks blue because air scatters short waves of light more than long ones ."
OTHER_ANSWER = "The sky looks blue since air scatters blue light more strongly than red ."
WORDS, OTHER = ANSWER.split(), OTHER_ANSWER.split()
WISH = "at most 2% perplexity loss"
HOSTILE = "<script>alert('é ∆ プロキシ $x^2$ & \"q\"')</script>"


def sample() -> Comparison:
    """Return a comparison as a sweep leaves it: two configurations failed, some have no speed, one no quality."""
    cells = [_dense(), *(_sparse(place, sparsity) for place in range(len(METHODS)) for sparsity in SPARSITIES)]
    failed = replace(_bare(_label(2, 0.7), "sparse", 0.7), settings=_settings(2, 0.7))
    cells = [replace(failed, error="out of memory: 93 MB asked for") if c.label == failed.label else c for c in cells]
    cells = [replace(c, quality=None) if c.label == _label(0, 0.3) else c for c in cells]
    return Comparison(
        meta=_meta(),
        cells=[*cells, _quantised("int8", 0.002, 1.12, 0.51), _quantised("int4", 0.083, 1.38, 0.29), _no_fp8()],
        recommendation=Recommendation(
            label=_label(3, 0.5),
            reason="Of 24 configurations it is the fastest whose whole 95% interval lies under 2%.",
            expected_loss=_loss(3, 0.5),
            interval=(0.8 * _loss(3, 0.5), 1.2 * _loss(3, 0.5)),
            confirmed_loss=1.1 * _loss(3, 0.5),
            confirmed=True,
        ),
    )


def hostile() -> Comparison:
    """Return the comparison with markup, mathematics and other scripts wherever it holds text of somebody else's."""
    made = sample()
    said = Sample([1, 2], ["</blockquote>", HOSTILE])

    def renamed(cell: Cell) -> Cell:
        return replace(
            cell,
            label=f"{cell.label} {HOSTILE}",
            error=cell.error and HOSTILE,
            sample=cell.sample and said,
            speed=cell.speed and replace(cell.speed, backend=HOSTILE),
            quality=cell.quality
            and replace(cell.quality, layers=[replace(one, name=HOSTILE) for one in cell.quality.layers]),
        )

    meta = {key: HOSTILE if isinstance(value, str) else value for key, value in made.meta.items()}
    meta |= {"caveats": [HOSTILE], "text": {"source": HOSTILE, "sha256": HOSTILE}, HOSTILE: HOSTILE}
    assert made.recommendation
    found = replace(made.recommendation, label=f"{made.recommendation.label} {HOSTILE}", reason=HOSTILE)
    return Comparison(meta, [renamed(cell) for cell in made.cells], found)


def nothing_measured() -> Comparison:
    """Return a comparison of which nothing came but names."""
    cells = [replace(cell, quality=None, speed=None, sample=None, weights_read=None) for cell in sample().cells]
    return Comparison({}, cells)


def _label(place: int, sparsity: float) -> str:
    return f"{METHODS[place][0]} at {sparsity:g}"


def _settings(place: int, sparsity: float) -> dict[str, object]:
    return {**METHODS[place][1], "sparsity": sparsity, "decision": "threshold", "allocation": "uniform"}


def _loss(place: int, sparsity: float) -> float:
    return 0.012 * METHODS[place][2] * math.exp(8.5 * (sparsity - 0.3)) / (1 - 0.5 * sparsity)


def _quality(loss: float) -> Quality:
    spread = 0.15 * loss + 0.0008
    return Quality(
        tokens=8176,
        perplexity=DENSE_PERPLEXITY * (1 + loss),
        loss=loss,
        loss_interval=(loss - spread, loss + spread),
        kl=0.6 * loss,
        top1=1 / (1 + 0.9 * loss**0.7),
    )


def _speed(speedup: float, read: float, backend: str) -> Speed:
    token = 1e6 / (DENSE_RATE * speedup)
    head, attention, rest = 1900.0, 1400.0, 1100.0
    split = {"ffn": token - head - attention - rest, "attention_linears": attention, "head": head, "rest": rest}
    return Speed(DENSE_RATE * speedup, speedup, 9800.0 * read, split, backend)


def _dense() -> Cell:
    said = Sample(list(range(len(WORDS))), [f" {word}" if place else word for place, word in enumerate(WORDS)])
    quality = replace(_quality(0.0), loss_interval=(0.0, 0.0), kl=0.0, top1=1.0)
    return Cell("dense", "dense", {}, None, 1.0, 1.0, quality, _speed(1.0, 1.0, "torch"), said)


def _sparse(place: int, sparsity: float) -> Cell:
    _, _, _, efficiency, recall = METHODS[place]
    read = 1 - 0.6 * sparsity * (0.67 if recall else 0.9)
    speed = _speed(1 + efficiency * (1 / read - 1), read, "cpu, avx512") if efficiency else None
    settings = _settings(place, sparsity)
    layers = [_layer(place, sparsity, block, name, recall) for block in range(BLOCKS) for name in _modules(recall)]
    realised = sum(layer.realised for layer in layers) / len(layers)
    quality = replace(_quality(_loss(place, sparsity)), realised_sparsity=realised, layers=layers)
    return Cell(
        _label(place, sparsity), "sparse", settings, sparsity, read, 1.7 * read - 0.7, quality, speed, _answer(place)
    )


def _modules(recall: float | None) -> tuple[str, ...]:
    return ("mlp",) if recall else ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def _layer(place: int, sparsity: float, block: int, name: str, recall: float | None) -> Layer:
    wave = math.sin(1.3 * block + 2 * place)
    realised = sparsity + 0.008 * wave - 0.0006 * (block - 15)
    always = 0.08 + 0.03 * math.cos(block)
    at = [point / (CURVE - 1) for point in range(CURVE)]
    activity = [min(1.0, (1 - sparsity) * (always / (x + always) * (2.6 - 0.3 * place) + 0.55 * (1 - x))) for x in at]
    module = f"model.layers.{block}.{name}"
    if recall is None:
        return Layer(module, sparsity, realised, activity=activity)
    found = min(1.0, recall + 0.02 * wave + 0.001 * block)
    return Layer(module, sparsity, realised, found, found - 0.01, (1 - found) / 9, activity)


def _answer(place: int) -> Sample:
    words = WORDS if place == 4 else WORDS[: 3 + place] + OTHER[3 + place :]
    known = {word: token for token, word in enumerate(WORDS)}
    tokens = [known.get(word, 100 + len(word)) for word in words]
    return Sample(tokens, [f" {word}" if at else word for at, word in enumerate(words)])


def _quantised(name: str, loss: float, speedup: float, read: float) -> Cell:
    quality, speed = _quality(loss), replace(_speed(speedup, read, "torchao"), split_us={})
    return Cell(name, "quantised", {"bits": name}, None, read, read, quality, speed, _answer(1))


def _no_fp8() -> Cell:
    return replace(_bare("fp8", "quantised", None), error="fp8 needs a GPU of compute capability 8.9 or more")


def _bare(label: str, kind: str, sparsity: float | None) -> Cell:
    return Cell(label, kind, {}, sparsity)


def _meta() -> dict[str, object]:
    return {
        "command": "countdown compare made-up-135m --sparsities 0.3,0.5,0.6,0.7 --max-loss 0.02 -o compared",
        "date": "2026-01-01T00:00:00+00:00",
        "hardware": {"cpu": "Made-up CPU 9000", "cores": 2, "threads": 2},
        "versions": {"python": "3.11.7", "countdown": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "model": "made-up-135m",
        "wish": WISH,
        "text": {"source": "wikitext2", "split": "evaluation", "sha256": "0123456789abcdef" * 4},
        "calibration": [{"source": "wikitext2", "split": "calibration", "sha256": "fedcba9876543210" * 4}],
        "windows": 16,
        "window_tokens": 512,
        "context": 128,
        "new_tokens": 64,
        "dtype": "bfloat16",
        "device": "cpu",
        "bandwidth": 21.4e9,
        "identity": {"weights": "00ff00ff", "windows": 16, "dtype": "bfloat16"},
        "prompt": "Explain in one sentence why the sky is blue.",
        "caveats": ["Every number in this report is made up: it shows what a report looks like, and nothing else."],
    }
