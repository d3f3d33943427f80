"""What a comparison found: dense, sparse and quantised configurations of one model, measured the same way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What a configuration is. `dense` is the yardstick, one of each comparison.
KINDS = ("dense", "sparse", "quantised")
# Points of the curve of how often neurons are active.
CURVE = 64


@dataclass(frozen=True)
class Layer:
    """One sparse module on the evaluated text.

    Args:
        name: The module's name.
        target, realised: Share of inactive terms that was wanted and that was found.
        recall, precision, lost: Of the active sets against the exact ones, see `SelectorQuality`; None where the
            module is no FFN.
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
    """

    tokens: int
    perplexity: float
    loss: float
    loss_interval: tuple[float, float]
    kl: float
    top1: float
    realised_sparsity: float | None = None
    layers: list[Layer] = field(default_factory=list)


@dataclass(frozen=True)
class Speed:
    """How fast a configuration decodes one sequence on this machine.

    Args:
        tokens_per_s: Of the decode loop.
        speedup: Over the dense model in the same session.
        floor_us: Time of a token if its weight bytes moved at the bandwidth measured beside, in µs.
        split_us: µs of a token in `ffn`, `attention_linears`, `head` and `rest`; empty where it is not known.
        backend: What computed it, as `status` names it.
    """

    tokens_per_s: float
    speedup: float
    floor_us: float
    split_us: dict[str, float] = field(default_factory=dict)
    backend: str = ""


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
        ffn_weights_read: The same, of the FFNs alone.
        quality, speed, sample: What was measured; None where it was not wanted, or failed.
        error: One line, where it failed.
    """

    label: str
    kind: str
    settings: dict[str, Any]
    sparsity: float | None
    weights_read: float | None = None
    ffn_weights_read: float | None = None
    quality: Quality | None = None
    speed: Speed | None = None
    sample: Sample | None = None
    error: str | None = None


@dataclass(frozen=True)
class Recommendation:
    """Which configuration to take.

    Args:
        label: Of its cell.
        reason: One or two sentences with the numbers that decided.
        expected_loss, interval: Loss and 95% interval on the evaluated text.
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
            `dtype`, `device`, `bandwidth` (bytes/s), `prompt`, `caveats` (list of sentences that must be shown).
        cells: Dense first.
        recommendation: None where nothing fits what was asked for.
    """

    meta: dict[str, Any]
    cells: list[Cell]
    recommendation: Recommendation | None = None
