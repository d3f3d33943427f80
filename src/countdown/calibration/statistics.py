"""The two streaming passes over the calibration text.

The first estimates second moments, from which the weights of an indicator follow; the second sketches the
weighted indicators, from which the threshold of any sparsity follows. Each keeps sums and counts only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from countdown.calibration.sketch import MagnitudeSketch
from countdown.errors import CountdownError
from countdown.methods import Method
from countdown.models.ffn import GatedFFN
from countdown.modules import observed
from countdown.progress import track

# By FFN, then by activation: E[a²] or E[u²], float64 [h].
Moments = dict[str, dict[str, Tensor]]
# By FFN: what each neuron's indicator is multiplied by, float32 [h], or None for 1.
Weights = dict[str, Tensor | None]
# By FFN: magnitudes of the weighted indicator, pooled over tokens and neurons.
Sketches = dict[str, MagnitudeSketch]


def second_moments(
    model: nn.Module, ffns: list[GatedFFN], windows: Tensor, names: Sequence[str], *, progress: bool = True
) -> Moments:
    """Return the mean square of the named activations of every neuron.

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

    _run(model, ffns, windows, observe, "calibrating, second moments", progress)
    return {
        site: {name: (total / windows.numel()).cpu() for name, total in by_name.items()}
        for site, by_name in sums.items()
    }


def magnitude_sketches(
    model: nn.Module,
    ffns: list[GatedFFN],
    windows: Tensor,
    methods: Sequence[tuple[Method, Mapping[str, Tensor | None]]],
    *,
    progress: bool = True,
) -> list[Sketches]:
    """Return, for each method with its weights, the sketch of the weighted indicator of every FFN.

    Arguments and errors are those of `second_moments`; `methods` pairs each method with its `Weights`.
    """
    device = ffns[0].linears[0].weight.device
    results: list[Sketches] = [{ffn.name: MagnitudeSketch(device=device) for ffn in ffns} for _ in methods]
    on_device = [
        {site: None if weight is None else weight.to(device) for site, weight in weights.items()}
        for _, weights in methods
    ]

    def observe(ffn: GatedFFN, a: Tensor, u: Tensor) -> None:
        _check_finite(ffn, a, u)
        a, u = a.float(), u.float()
        for (method, _), weights, sketches in zip(methods, on_device, results, strict=True):
            value = method.indicator.formula(a, u)
            weight = weights[ffn.name]
            sketches[ffn.name].add(value if weight is None else value * weight)

    _run(model, ffns, windows, observe, "calibrating, thresholds", progress)
    return results


def _run(
    model: nn.Module,
    ffns: list[GatedFFN],
    windows: Tensor,
    observe: Callable[[GatedFFN, Tensor, Tensor], None],
    description: str,
    progress: bool,
) -> None:
    # Only the decoder: the vocabulary's logits are not needed, and cost more than a layer.
    decoder = model.get_decoder()  # type: ignore[operator]
    device = ffns[0].linears[0].weight.device
    with torch.inference_mode(), observed(model, ffns, observe):
        for window in track(windows, description, show=progress):
            decoder(input_ids=window[None].to(device), use_cache=False)


def _check_finite(ffn: GatedFFN, a: Tensor, u: Tensor) -> None:
    # A sum is finite only if every term is; one read-back for each layer and window.
    if not bool((a.float().sum() + u.float().sum()).isfinite()):
        raise CountdownError(
            f"activations of {ffn.name} are not finite in {a.dtype}; calibrate in a wider dtype (--dtype bfloat16)."
        )
