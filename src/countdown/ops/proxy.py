"""A proxy of a gated FFN: W_gate and W_up in few bits, to decide by ŝ = act(ĝ) ⊙ û before anything exact is read.

A weight is one of 2^b levels ±½, ±1½, ... times the scale of its group of about `GROUP` weights of a row. A scale is
the one of a few shrunken ranges that loses least where inputs are large: it minimises Σ_j E[x_j²] (w_j − ŵ_j)². Inputs
are rounded to 8 bits a token, so that a product is one of integers. Both are ours; the idea is near Prox, arXiv
2607.27591.

Levels are packed in bit planes: bit p of eight neighbours is one byte of plane p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.ops.proxy_format import GROUP

# Shares of a group's range that are tried for its scale.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
# Rows that are quantised at once: what is tried for a scale is held in float32.
_ROWS = 1024


@dataclass(frozen=True)
class ProxyMatrix:
    """One matrix in few bits.

    Args:
        planes: uint8 `[bits, h, d_padded / 8]`.
        scales: float16 `[h, groups]`; d_padded / groups is the size of a group.
    """

    planes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of planes and scales."""
        return self.planes.nbytes + self.scales.nbytes


@torch.no_grad()
def quantise(weight: Tensor, importance: Tensor, bits: int) -> ProxyMatrix:
    """Return `weight` in few bits.

    It depends on the values alone, not on the dtype that holds them; where two scales are about as good, sums in
    another order may prefer the other.

    Args:
        weight: Float `[h, d]`.
        importance: E[x_j²], float32 `[d]`: what an error in column j costs.
        bits: 3 or 4.
    """
    d = weight.shape[1]
    groups = _ceil(d, GROUP)
    size = _ceil(_ceil(d, groups), 8) * 8
    cost = F.pad(importance.to(weight.device, torch.float32), (0, groups * size - d)).view(1, groups, size)
    parts = [_quantise(rows, cost, bits) for rows in weight.split(_ROWS)]
    planes, scales = zip(*parts, strict=True)
    return ProxyMatrix(torch.cat(planes, dim=1), torch.cat(scales))


def _quantise(rows: Tensor, cost: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _, groups, size = cost.shape
    values = F.pad(rows.float(), (0, groups * size - rows.shape[1])).view(len(rows), groups, size)
    half = 2 ** (bits - 1)
    reach = values.abs().amax(dim=-1) / (half - 0.5)
    best = torch.full_like(reach, torch.inf)
    scales = torch.zeros_like(reach, dtype=torch.float16)
    for shrink in SHRINK:
        tried = (shrink * reach).half()
        error = ((_levels(values, tried, half) + 0.5) * tried.float()[..., None] - values).square()
        lost = (error * cost).sum(dim=-1)
        better = lost < best
        best, scales = torch.where(better, lost, best), torch.where(better, tried, scales)
    levels = (_levels(values, scales, half) + half).to(torch.uint8).view(len(rows), -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=rows.device)
    planes = [((levels >> plane & 1) << places).sum(dim=-1).to(torch.uint8) for plane in range(bits)]
    return torch.stack(planes), scales


def _levels(values: Tensor, scales: Tensor, half: int) -> Tensor:
    # A group of zeros has scale 0.
    steps = values / torch.where(scales == 0, 1, scales.float())[..., None]
    return (steps - 0.5).round().clamp(-half, half - 1)


def dequantise(planes: Tensor, scales: Tensor, d: int) -> Tensor:
    """Return the weights of a `ProxyMatrix`, float32 `[h, d]`."""
    bits, h, width = planes.shape
    places = torch.arange(8, dtype=torch.uint8, device=planes.device)
    levels = torch.zeros(h, width, 8, dtype=torch.uint8, device=planes.device)
    for plane in range(bits):
        levels |= (planes[plane][..., None] >> places & 1) << plane
    steps = levels.view(h, scales.shape[1], -1).float() - (2 ** (bits - 1) - 0.5)
    weights: Tensor = (steps * scales.float()[..., None]).view(h, -1)[:, :d]
    return weights


def factors(
    x: Tensor, proxy: list[Tensor], biases: list[Tensor | None], act: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return what the proxy takes act(W_gate x) and W_up x for, float32 `[..., h]`.

    Args:
        x: `[..., d]`.
        proxy: Planes and scales of gate, planes and scales of up.
        biases: Of gate and up.
        act: The activation.
    """
    gate_planes, gate_scales, up_planes, up_scales = proxy
    rounded = round_tokens(x)
    gate, up = dequantise(gate_planes, gate_scales, x.shape[-1]), dequantise(up_planes, up_scales, x.shape[-1])
    gate_bias, up_bias = (None if bias is None else bias.float() for bias in biases[:2])
    return act(F.linear(rounded, gate, gate_bias)), F.linear(rounded, up, up_bias)


def round_tokens(x: Tensor) -> Tensor:
    """Return x with each token rounded to 255 even steps between ± its largest entry, float32."""
    x = x.float()
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(step > 0, (x / step).round() * step, x)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
