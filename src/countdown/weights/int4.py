"""Weights in 4 bits: what a sum is computed with, not only decided by.

Groups of 64 neighbours share a scale; a weight is one of 16 levels ±½, ±1½, ... ±7½ times it. Neighbours are entries of
a row, or, stored by column, of a column: what a sparse sum gathers lies side by side, scales and all. Ours.

A row (or column) is uint8 [groups · 34]: 16 words of 16 bits for each group, entry 16 k + j of a group in bits 4 k to
4 k + 3 of word j, the lowest byte first; then the scales of all groups in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from countdown.errors import ConfigError
from countdown.weights._base import Weight, register
from countdown.weights.symmetric import SHRINK

GROUP = 64
LEVEL_BYTES, SCALE_BYTES = GROUP // 2, 2
GROUP_BYTES = LEVEL_BYTES + SCALE_BYTES
HIGHEST = 7.5
# Rows that are rounded at once: what is tried for a scale is held in float32.
_ROWS = 1024


class Int4(Weight):
    """One tensor uint8 [rows, columns / 64 · 34]; columns are a multiple of 64."""

    format = "int4"
    part_names = ("packed",)
    by_columns: ClassVar[bool] = False
    __slots__ = ()

    @classmethod
    def of(cls, parts: Sequence[Tensor], shape: tuple[int | None, int | None]) -> Int4:
        found = len(parts[0]), parts[0].shape[1] // GROUP_BYTES * GROUP
        rows, columns = reversed(found) if cls.by_columns else found
        return cls(parts, (rows, columns))

    def values(self) -> Tensor:
        matrix = unpacked(self.parts[0])
        return matrix.t() if self.by_columns else matrix

    def problem(self) -> str | None:
        (packed,) = self.parts
        rows, columns = reversed(self.shape) if self.by_columns else self.shape
        expected = (rows, columns // GROUP * GROUP_BYTES)
        if packed.dtype == torch.uint8 and tuple(packed.shape) == expected and columns % GROUP == 0:
            return None
        return f"is {packed.dtype} {tuple(packed.shape)}, expected uint8 {expected}"

    def lies_by(self, dim: int) -> bool:
        return self.parts[0].stride(1) == 1 and dim == (0 if self.by_columns else 1)

    def by_column(self) -> Weight:
        """See `Weight.by_column`; of what is stored by row rounding anew would make another matrix."""
        return self if self.by_columns else super().by_column()

    def sliced(self, dim: int, part: slice) -> Weight:
        """See `Weight.sliced`; of whole rows, or of whole columns where it is stored by column."""
        if dim != int(self.by_columns):
            return super().sliced(dim, part)
        return type(self).of([self.parts[0][part]], (None, None))


@register
class Int4ByRow(Int4):
    """Stored by row."""

    __slots__ = ()


@register
class Int4ByColumn(Int4):
    """Stored by column: uint8 [columns, rows / 64 · 34]; rows are a multiple of 64."""

    format = "int4-by-column"
    by_columns = True
    __slots__ = ()


def rounded(matrix: Tensor, *, by_column: bool = False, weights: Tensor | None = None) -> Int4:
    """Return a matrix in 4 bits.

    Each group takes the scale, of a few shrunken ranges, that loses least: Σ_j m_j (w_j - ŵ_j)².

    Args:
        matrix: float `[rows, columns]`.
        by_column: Store it by column, with scales for groups of a column.
        weights: m, float `[columns]`; all alike by default, and within a column they are.

    Raises:
        ConfigError: The neighbours of a group are not all there.
    """
    stored = matrix.t() if by_column else matrix
    if stored.shape[1] % GROUP:
        raise ConfigError(f"{stored.shape[1]} weights in a row do not divide into groups of {GROUP}.")
    counted = None if by_column or weights is None else weights.float().view(1, -1, GROUP)
    packed = torch.cat([_packed(*_rounded(rows.float(), counted)) for rows in stored.split(_ROWS)])
    return (Int4ByColumn if by_column else Int4ByRow).of([packed], (None, None))


def _rounded(rows: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return levels, 0 to 15, uint8 `[rows, groups, 64]`, and scales float16 `[rows, groups]`."""
    groups = rows.view(len(rows), -1, GROUP)
    most = groups.abs().amax(dim=2)
    least, scales = torch.full_like(most, torch.inf), torch.zeros_like(most)
    for shrink in SHRINK:
        scale = scale_of(most * shrink)
        values = (levels_of(groups, scale) - HIGHEST) * scale[..., None]
        error = (values - groups).square_()
        total = (error if counted is None else error * counted).sum(dim=2)
        scales = torch.where(total < least, scale, scales)
        least = torch.minimum(total, least)
    # A group of zeros has levels, too, times 0.
    return levels_of(groups, scales).to(torch.uint8), torch.where(most > 0, scales, 0).half()


def scale_of(most: Tensor) -> Tensor:
    """Return the scales of groups whose largest weight is to be the highest level, rounded as they are stored."""
    # What float16 holds: no weight of a model comes near.
    return (most / HIGHEST).clamp(min=6e-8, max=65504.0).half().float()


def levels_of(groups: Tensor, scales: Tensor) -> Tensor:
    """Return the nearest levels, 0 to 15, in float32, of groups `[..., 64]` with scales `[...]`."""
    return (groups / scales[..., None] + HIGHEST).round_().clamp_(0, 15)


def _packed(levels: Tensor, scales: Tensor) -> Tensor:
    """Return rows uint8 `[rows, groups · 34]`."""
    words = levels.view(*levels.shape[:2], 4, 16).int()
    words = words[:, :, 0] | words[:, :, 1] << 4 | words[:, :, 2] << 8 | words[:, :, 3] << 12
    halves = torch.stack([words & 255, words >> 8], dim=-1).to(torch.uint8)
    return torch.cat([halves.flatten(1), scales.contiguous().view(torch.uint8).view(len(scales), -1)], dim=1)


def unpacked(packed: Tensor) -> Tensor:
    """Return the values of rows, float32 `[rows, groups · 64]`; exact."""
    rows, groups = len(packed), packed.shape[1] // GROUP_BYTES
    low, high = packed[:, : groups * LEVEL_BYTES].reshape(rows, groups, 16, 2).int().unbind(-1)
    words = low | high << 8
    levels = torch.stack([words >> 4 * k & 15 for k in range(4)], dim=2).view(rows, groups, GROUP)
    scales = packed[:, groups * LEVEL_BYTES :].contiguous().view(torch.float16).float()
    return ((levels.float() - HIGHEST) * scales[..., None]).flatten(1)
