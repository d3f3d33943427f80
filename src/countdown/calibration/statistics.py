"""The two streaming passes over the calibration text.

The first runs the model dense and estimates second moments, from which the weights of an indicator follow. The
second runs it sparse and estimates thresholds: what a layer sees, and so how many of its neurons lie below a
threshold, depends on how sparse the layers before it are. Each pass keeps sums and counts only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from countdown.calibration.sketch import MagnitudeSketch
from countdown.errors import CountdownError
from countdown.methods import Method
from countdown.models.ffn import GatedFFN
from countdown.modules import Observer, observed
from countdown.progress import track

# The sparsities at which the second pass runs the model, beside the one that was asked for.
LEVELS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
# A threshold curve has a point for each thousandth of sparsity.
POINTS = 1000

# By FFN, then by activation: E[a²] or E[u²], float64 [h].
Moments = dict[str, dict[str, Tensor]]
# By FFN: what each neuron's indicator is multiplied by, float32 [h], or None for 1.
Weights = Mapping[str, Tensor | None]


def second_moments(
    model: nn.Module, ffns: list[GatedFFN], windows: Tensor, names: Sequence[str], *, progress: bool = True
) -> Moments:
    """Return the mean square of the named activations of every neuron, in the dense model.

    Args:
        model: A dense causal language model in eval mode.
        ffns: Its FFNs.
        windows: Token ids, int64 `[n, length]`.
        names: Out of `gate` (a = act(g)) and `up` (u).
        progress: Show progress on stderr.

    Raises:
        CountdownError: An activation is not finite.
    """
    sums: Moments = {ffn.name: {} for ffn in ffns}

    def observe(ffn: GatedFFN, a: Tensor, u: Tensor) -> None:
        _check_finite(ffn, a, u)
        for name, value in (("gate", a), ("up", u)):
            if name in names:
                squares = value.flatten(0, -2).double().square().sum(dim=0)
                sums[ffn.name][name] = sums[ffn.name].get(name, 0) + squares

    with _decoding(model, ffns, observe) as feed:
        for window in track(windows, "calibrating, second moments", show=progress):
            feed(window)
    return {
        site: {name: (total / windows.numel()).cpu() for name, total in by_name.items()}
        for site, by_name in sums.items()
    }


def threshold_curves(
    model: nn.Module, ffns: list[GatedFFN], windows: Tensor, method: Method, weights: Weights, *, progress: bool = True
) -> dict[str, Tensor]:
    """Return, for every FFN, the threshold of its weighted indicator at any sparsity, all layers being sparse.

    Every window runs at one sparsity in all layers: the even ones at the method's own, the odd ones at `LEVELS`
    in turn. A layer's threshold is the quantile of what it has seen so far at that sparsity, the present window
    included, so that its mean over the text converges while the text is read once.

    Args:
        model, ffns, windows, progress: As for `second_moments`.
        method: Its sparsity and indicator count here.
        weights: Of its indicator.

    Returns:
        float32 `[1000]` by FFN: the thresholds for sparsities 0, 0.001, ..., 0.999; the first is -1.

    Raises:
        CountdownError: An activation is not finite.
    """
    passing = _ThresholdPass(ffns, method, weights)
    schedule = itertools.islice(_schedule(method.sparsity), len(windows))
    with _decoding(model, ffns, passing.observe) as feed:
        shown = track(windows, f"calibrating, thresholds of {method.label}", show=progress)
        for level, window in zip(schedule, shown, strict=True):
            passing.level = level
            feed(window)
    return {name: threshold_curve(sketches) for name, sketches in passing.sketches.items()}


def threshold_curve(sketches: Mapping[float, MagnitudeSketch]) -> Tensor:
    """Return thresholds for sparsities 0 to 0.999, float32 `[1000]`, from sketches made at some sparsities.

    Between two of those, it is between their quantiles; beyond them, the nearest one's counts.
    """
    levels = sorted(sketches)
    q = torch.arange(1, POINTS, dtype=torch.float64) / POINTS
    by_level = torch.stack([sketches[level].quantiles(q) for level in levels])
    position = torch.tensor(levels, dtype=torch.float64)
    above = torch.searchsorted(position, q).clamp(max=len(levels) - 1)
    below = (above - 1).clamp(min=0)
    gap = position[above] - position[below]
    share = torch.where(gap > 0, (q - position[below]) / gap, 1.0).clamp(0, 1)
    points = torch.arange(POINTS - 1)
    curve = torch.lerp(by_level[below, points], by_level[above, points], share)
    # More sparsity never means a lower threshold, whatever text the levels happened to see.
    return torch.cat([torch.tensor([-1.0]), curve.cummax(0).values.float()])


class _ThresholdPass:
    """Masks every layer at the present level and sketches what it saw."""

    def __init__(self, ffns: list[GatedFFN], method: Method, weights: Weights) -> None:
        self._device = ffns[0].linears[0].weight.device
        self._formula = method.indicator.formula
        self._weights = {name: None if weight is None else weight.to(self._device) for name, weight in weights.items()}
        self.sketches: dict[str, dict[float, MagnitudeSketch]] = {ffn.name: {} for ffn in ffns}
        self.level = 0.0

    def observe(self, ffn: GatedFFN, a: Tensor, u: Tensor) -> Tensor | None:
        _check_finite(ffn, a, u)
        weight = self._weights[ffn.name]
        value = self._formula(a.float(), u.float())
        value = value if weight is None else value * weight
        sketch = self.sketches[ffn.name].setdefault(self.level, MagnitudeSketch(self._device))
        sketch.add(value)
        if self.level == 0:
            return None
        return value > sketch.quantiles(torch.tensor([self.level], device=self._device)).float()


def _schedule(own: float) -> Iterator[float]:
    others = itertools.cycle(level for level in LEVELS if level != own)
    while True:
        yield own
        yield next(others)


class _Feed:
    """Runs the decoder on a window. Not the head: the vocabulary's logits cost more than a layer."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._decoder = model.get_decoder()  # type: ignore[operator]
        self._device = device

    def __call__(self, window: Tensor) -> None:
        self._decoder(input_ids=window[None].to(self._device), use_cache=False)


@contextmanager
def _decoding(model: nn.Module, ffns: list[GatedFFN], observe: Observer) -> Iterator[_Feed]:
    with torch.inference_mode(), observed(model, ffns, observe):
        yield _Feed(model, ffns[0].linears[0].weight.device)


def _check_finite(ffn: GatedFFN, a: Tensor, u: Tensor) -> None:
    # A sum is finite only if every term is; one read-back for each layer and window.
    if not bool((a.float().sum() + u.float().sum()).isfinite()):
        raise CountdownError(
            f"activations of {ffn.name} are not finite in {a.dtype}; calibrate in a wider dtype (--dtype bfloat16)."
        )
