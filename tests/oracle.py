"""An independent truth: one gated FFN in float64, neuron by neuron, from the definitions in docs/methods.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from countdown.weights.symmetric import Symmetric


def softplus(v: float) -> float:
    return v if v > 30 else math.log1p(math.exp(v))


ACT = {
    "silu": lambda v: v / (1 + math.exp(-v)) if v > -700 else 0.0,
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "relu": lambda v: max(v, 0.0),
    "relu2": lambda v: max(v, 0.0) ** 2,
    "relu6": lambda v: min(max(v, 0.0), 6.0),
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)) if v > -400 else 0.0,
    "gelu_10": lambda v: min(max(0.5 * v * (1 + math.erf(v / math.sqrt(2))), -10.0), 10.0),
    "hardswish": lambda v: v * min(max(v + 3, 0.0), 6.0) / 6,
    "mish": lambda v: v * math.tanh(softplus(v)),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)) if v > -700 else 0.0,
    "tanh": math.tanh,
    "laplace": lambda v: 0.5 * (1 + math.erf((v - 0.707107) / (0.282095 * math.sqrt(2)))),
    "sqrtsoftplus": lambda v: math.sqrt(softplus(v)),
    "linear": lambda v: v,
}
INDICATOR = {
    "up": lambda a, u: abs(u),
    "gate": lambda a, u: abs(a),
    "coefficient": lambda a, u: abs(a * u),
    "proxy-4": lambda a, u: abs(a * u),
    "proxy-3": lambda a, u: abs(a * u),
    "input": abs,
}
FFN_INDICATORS = ("up", "gate", "coefficient")


def projections(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str
) -> tuple[Tensor, Tensor]:
    """Return a and u, float64 [T, h], for x [T, d]."""
    x, (gate, up, _) = x.double(), [weight.double() for weight in weights]
    g, u = x @ gate.T, x @ up.T
    if biases[0] is not None:
        g = g + biases[0].double()
    if biases[1] is not None:
        u = u + biases[1].double()
    return g.clone().apply_(ACT[activation]), u


def proxy_weights(packed: Tensor, scales: Tensor, d: int, bits: int = 4) -> Tensor:
    """Return the weights of a proxy, float64 [h, d], from the packing that docs/methods.md describes."""
    width = packed.shape[1] * 8 // bits
    size = width // scales.shape[1]
    weights = torch.zeros(len(packed), d).double()
    for j in range(d):
        eight, place = divmod(j, 8)
        if bits == 4:
            level = packed[:, 4 * eight + place % 4].int() >> 4 * (place // 4) & 15
        else:
            low = packed[:, 2 * eight + place % 2].int() >> 2 * (place // 2) & 3
            level = low + 4 * (packed[:, width // 4 + eight].int() >> place & 1)
        weights[:, j] = (level - 2 ** (bits - 1) + 0.5) * scales[:, j // size].double()
    return weights


def proxy_factors(
    x: Tensor, proxy: Sequence[Symmetric], biases: list[Tensor | None], activation: str, *, unpacked: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what a proxy takes a and u for, float64 [T, h], for x [T, d]: each token rounded to 255 steps.

    unpacked: take the weights from the format itself, where `proxy_weights` takes too long.
    """
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    # Half the largest lies between two steps: which one it becomes is decided in float32.
    steps = (x.float() * torch.where(largest > 0, (torch.full_like(largest, 127) / largest).clamp(max=3e38), 0)).round()
    rounded = steps.double() * largest.double() / 127
    weights = [
        weight.values().cpu().double()
        if unpacked
        else proxy_weights(*(part.cpu() for part in weight.in_rows().parts), x.shape[-1], weight.bits)
        for weight in proxy
    ]
    return projections(rounded, [*weights, weights[0]], biases, activation)


def topk_active(scores: list[float], drop: int) -> list[bool]:
    """Drop the `drop` smallest, ties by lower index first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    dropped = set(order[:drop])
    return [i not in dropped for i in range(len(scores))]


def combine(a: Tensor, u: Tensor, active: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """Return Σ over active neurons of s_i w_i, float64 [T, d]."""
    y = (a * u * active.double()) @ weights[2].double().T
    return y if biases[2] is None else y + biases[2].double()


def relative_error(out: Tensor, reference: Tensor) -> float:
    norm = reference.norm().item()
    return (out.double() - reference).norm().item() / (norm or 1.0)


def random_ffn(
    d: int, h: int, dtype: torch.dtype, *, bias: bool = False, seed: int = 0
) -> tuple[list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    weights = [draw(h, d), draw(h, d), draw(d, h)]
    return weights, [draw(h), draw(h), draw(d)] if bias else [None, None, None]
