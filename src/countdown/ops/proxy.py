"""A proxy of a gated FFN: W_gate and W_up in few bits, to decide by ŝ = act(ĝ) ⊙ û before anything exact is read.

A weight is one of 2^b levels ±½, ±1½, ... times the scale of its group of weights of a row. A scale is the one of a few
shrunken ranges that loses least where inputs are large: it minimises Σ_j E[x_j²] (w_j − ŵ_j)². Inputs are rounded to 8
bits a token, so that a product is one of integers. Both are ours; the idea is near Prox, arXiv 2607.27591.

Levels are packed in fields: a level of 4 bits is one field, of 3 bits a field of its low 2 and one of its high bit.
Of eight neighbours, fields of f bits fill f bytes: neighbour j stands in byte j mod f, from bit f · (j div f) up. Four
neighbours so lie in the same bits of four bytes, ready for products of bytes. A row is all of the first field, then
all of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.errors import ConfigError
from countdown.ops.proxy_format import FIELDS, group_of, padded

# Shares of a group's range that are tried for its scale.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
# Rows that are quantised at once: what is tried for a scale is held in float32.
_ROWS = 1024


@dataclass(frozen=True)
class ProxyMatrix:
    """One matrix in few bits.

    Args:
        levels: uint8 `[h, bits * d_padded / 8]`.
        scales: float16 `[h, groups]`; d_padded / groups is the size of a group.
    """

    levels: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of levels and scales."""
        return self.levels.nbytes + self.scales.nbytes


@contextmanager
def memory_for(total: int) -> Iterator[None]:
    """Within the context proxies are made, of so many bytes in all.

    Raises:
        ConfigError: Memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Of a CPU torch raises a RuntimeError that says so.
        out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not total or not out:
            raise
        raise ConfigError(
            f"memory ran out while making proxies, which take {total / 1e9:.2f} GB beside the weights: free some, or "
            "take a method without a proxy."
        ) from error


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
    cost = F.pad(importance.to(weight.device, torch.float32), (0, padded(d, bits) - d)).view(1, -1, group_of(d, bits))
    parts = [_quantise(rows, cost, bits) for rows in weight.split(_ROWS)]
    levels, scales = zip(*parts, strict=True)
    return ProxyMatrix(torch.cat(levels), torch.cat(scales))


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
    levels = (_levels(values, scales, half) + half).to(torch.uint8)
    return _pack(levels.view(len(rows), -1), bits), scales


def _pack(levels: Tensor, bits: int) -> Tensor:
    parts, below = [], 0
    for field in FIELDS[bits]:
        values = (levels >> below) & (2**field - 1)
        places = torch.arange(0, 8, field, dtype=torch.uint8, device=levels.device)[:, None]
        parts.append((values.view(len(levels), -1, 8 // field, field) << places).sum(dim=2).to(torch.uint8).flatten(1))
        below += field
    return torch.cat(parts, dim=1)


def _unpack(packed: Tensor, width: int, bits: int) -> Tensor:
    levels, below = torch.zeros(len(packed), width, dtype=torch.uint8, device=packed.device), 0
    for field, part in zip(FIELDS[bits], packed.split([f * width // 8 for f in FIELDS[bits]], dim=1), strict=True):
        places = torch.arange(0, 8, field, dtype=torch.uint8, device=packed.device)[:, None]
        values = (part.view(len(packed), -1, 1, field) >> places) & (2**field - 1)
        levels |= values.flatten(1) << below
        below += field
    return levels


def _levels(values: Tensor, scales: Tensor, half: int) -> Tensor:
    # A group of zeros has scale 0.
    steps = values / torch.where(scales == 0, 1, scales.float())[..., None]
    return (steps - 0.5).round().clamp(-half, half - 1)


def dequantise(levels: Tensor, scales: Tensor, d: int) -> Tensor:
    """Return the weights of a `ProxyMatrix`, float32 `[h, d]`."""
    bits = bits_of(levels, d)
    steps = _unpack(levels, padded(d, bits), bits).view(*scales.shape, -1).float() - (2 ** (bits - 1) - 0.5)
    weights: Tensor = (steps * scales.float()[..., None]).flatten(1)[:, :d]
    return weights


def bits_of(levels: Tensor, d: int) -> int:
    """Return the bits of the levels of rows of d weights, 0 where no packing fits."""
    return next((bits for bits in FIELDS if levels.shape[1] * 8 == bits * padded(d, bits)), 0)


def factors(
    x: Tensor, proxy: list[Tensor], biases: list[Tensor | None], act: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return what the proxy takes act(W_gate x) and W_up x for, float32 `[..., h]`.

    Args:
        x: `[..., d]`.
        proxy: Levels and scales of gate, levels and scales of up.
        biases: Of gate and up.
        act: The activation.
    """
    gate_levels, gate_scales, up_levels, up_scales = proxy
    rounded = round_tokens(x)
    gate, up = dequantise(gate_levels, gate_scales, x.shape[-1]), dequantise(up_levels, up_scales, x.shape[-1])
    gate_bias, up_bias = (None if bias is None else bias.float() for bias in biases[:2])
    return act(F.linear(rounded, gate, gate_bias)), F.linear(rounded, up, up_bias)


def round_tokens(x: Tensor) -> Tensor:
    """Return x with each token rounded to 255 even steps between ± its largest entry, float32."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    # Bounded, for entries so small that the quotient is infinite; times, for kernels to round alike. A number over a
    # tensor would be rounded twice.
    per_step = torch.where(largest > 0, (torch.full_like(largest, 127) / largest).clamp(max=3e38), 0)
    return (x * per_step).round() * (largest / 127)
