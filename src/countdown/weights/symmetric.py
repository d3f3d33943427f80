"""Matrices in 4 or 3 bits, to decide by.

A weight is one of 2^b levels ±½, ±1½, ... times the scale of its group of weights of a row. A scale is the one of a few
shrunken ranges that loses least where inputs are large: it minimises Σ_j E[x_j²] (w_j − ŵ_j)². Ours.

Levels are packed in fields: a level of 4 bits is one field, of 3 bits a field of its low 2 and one of its high bit.
Of eight neighbours, fields of f bits fill f bytes: neighbour j stands in byte j mod f, from bit f · (j div f) up. Four
neighbours so lie in the same bits of four bytes, ready for products of bytes. A row is all of the first field, then
all of the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.weights._base import Weight, register

GROUP = 64
BITS = (3, 4)
# What a level is packed as: fields of so many of its bits, the lowest first.
FIELDS = {4: (4,), 3: (2, 1)}
# Shares of a group's range that are tried for its scale.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
# Rows that are quantised at once: what is tried for a scale is held in float32.
_ROWS = 1024
# So many values are unpacked at a time in a product: 4 MB in float32 on a CPU, which its caches hold, elsewhere 64 MB.
_CPU_VALUES, _VALUES = 1 << 20, 1 << 24
# Rows of a tile.
TILE = 16


def group_of(columns: int, bits: int) -> int:
    """Return the size of a group in rows of so many weights: of 64, 32, 16 and 8 what takes the fewest bytes."""
    if columns % GROUP == 0:  # at every call of every FFN
        return GROUP
    return min((64, 32, 16, 8), key=lambda size: -(-columns // size) * (size * bits + 16))


def padded(columns: int, bits: int) -> int:
    """Return the columns rounded up to whole groups."""
    size = group_of(columns, bits)
    return -(-columns // size) * size


class Symmetric(Weight):
    """Levels uint8 [rows, bits · padded / 8] and scales float16 [rows, groups]."""

    part_names = ("levels", "scales")
    bits: ClassVar[int]
    __slots__ = ()

    @classmethod
    def part_shapes(cls, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of levels and scales of a matrix."""
        width = padded(columns, cls.bits)
        return (rows, cls.bits * width // 8), (rows, width // group_of(columns, cls.bits))

    @classmethod
    def bytes_of(cls, rows: int, columns: int) -> int:
        """Return the bytes of a matrix."""
        (height, levels), (_, scales) = cls.part_shapes(rows, columns)
        return height * (levels + 2 * scales)

    def problem(self) -> str | None:
        levels, scales = self.parts
        fits = (tuple(levels.shape), tuple(scales.shape)) == self.part_shapes(*self.shape)
        if fits and (levels.dtype, scales.dtype) == (torch.uint8, torch.float16):
            return None
        return (
            f"has levels {levels.dtype} {tuple(levels.shape)} and scales {scales.dtype} {tuple(scales.shape)}, which "
            f"do not fit {self.shape} in {self.bits} bits"
        )

    def values(self) -> Tensor:
        levels, scales = self.parts
        columns = self.shape[1]
        steps, size = _unpack(levels, padded(columns, self.bits), self.bits).view(*scales.shape, -1), scales.float()
        # In two passes over memory. Exact: a step times its scale has 15 bits.
        weights: Tensor = (steps * size[..., None]).sub_(((2 ** (self.bits - 1) - 0.5) * size)[..., None])
        return weights.flatten(1)[:, :columns]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Weight.product`; some rows are unpacked at a time."""
        exact = x.float()
        product = torch.cat([F.linear(exact, rows) for rows in self._unpacked()], dim=-1)
        return (product if bias is None else product + bias.float()).to(x.dtype)

    def product_of_steps(self, steps: Tensor, size: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Weight.product_of_steps`; where it can be one of bfloat16, which loses nothing, summed in float32."""
        if not _multiplies_bfloat16(steps.device):
            return super().product_of_steps(steps, size, bias)
        exact = steps.reshape(-1, self.shape[1]).bfloat16().repeat(1, 2)
        products = [torch.mm(exact, halves(rows).t(), out_dtype=torch.float32) for rows in self._unpacked()]
        product = torch.cat(products, dim=-1).view(*steps.shape[:-1], self.shape[0]) * size
        return product if bias is None else product + bias.float()

    def _unpacked(self) -> Iterator[Tensor]:
        """Yield `values` some rows at a time."""
        whole = self.in_rows()
        count = max(1, (_CPU_VALUES if self.device.type == "cpu" else _VALUES) // max(1, self.shape[1]))
        for start in range(0, self.shape[0], count):
            yield whole.sliced(0, slice(start, start + count)).values()

    def sliced(self, dim: int, part: slice) -> Weight:
        """See `Weight.sliced`; by rows alone."""
        if dim:
            return super().sliced(dim, part)
        parts = [tensor[part] for tensor in self.parts]
        return type(self)(parts, (len(parts[0]), self.shape[1]))


@register
class Symmetric3(Symmetric):
    """Of 3 bits."""

    format = "symmetric-3"
    bits = 3
    __slots__ = ()


@register
class Symmetric4(Symmetric):
    """Of 4 bits."""

    format = "symmetric-4"
    bits = 4
    __slots__ = ()

    def in_tiles(self) -> Tiles4:
        """Return it as kernels for CPUs read it."""
        levels, scales = self.parts
        missing = (0, 0, 0, -len(levels) % TILE)
        tiles = _turned(F.pad(levels, missing).view(torch.int32), TILE)
        return Tiles4(
            [tiles.view(torch.uint8).unflatten(2, (TILE, 4)), _turned(F.pad(scales, missing), TILE)], self.shape
        )


@register
class Tiles4(Symmetric):
    """`Symmetric4` in tiles, the form that kernels for CPUs read.

    A tile is 16 rows whose words of 4 bytes stand side by side: levels uint8 [tiles, words, 16, 4], scales float16
    [tiles, groups, 16]. One vector instruction then multiplies a word of each row with the same eight entries of the
    token, and no sum runs across a vector. Beyond the last row a tile has zeros.
    """

    format = "symmetric-4-tiles"
    bits = 4
    __slots__ = ()

    @classmethod
    def part_shapes(cls, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        (_, bytes_), (_, groups) = Symmetric4.part_shapes(rows, columns)
        tiles = -(-rows // TILE)
        return (tiles, bytes_ // 4, TILE, 4), (tiles, groups, TILE)

    def in_rows(self) -> Symmetric4:
        """Return it as it is made and stored."""
        levels, scales = self.parts
        words, groups = levels.shape[1], scales.shape[1]
        rows = _turned(levels.flatten(0, 1).flatten(1).view(torch.int32), words).view(torch.uint8).flatten(0, 1)
        return Symmetric4(
            [rows[: self.shape[0]], _turned(scales.flatten(0, 1), groups).flatten(0, 1)[: self.shape[0]]], self.shape
        )

    def in_tiles(self) -> Tiles4:
        """Return it as it is."""
        return self

    def values(self) -> Tensor:
        return self.in_rows().values()

    def sliced(self, dim: int, part: slice) -> Weight:
        return self.in_rows().sliced(dim, part)


def _turned(matrix: Tensor, rows: int) -> Tensor:
    """Return each block of so many rows of a matrix transposed: `[blocks · rows, n]` as `[blocks, n, rows]`."""
    # Not `contiguous`, which leaves the strides of a dimension of 1 as they are.
    turned: Tensor = matrix.unflatten(0, (-1, rows)).mT.clone(memory_format=torch.contiguous_format)
    return turned


FORMATS: dict[int, type[Symmetric]] = {cls.bits: cls for cls in (Symmetric3, Symmetric4)}


@torch.no_grad()
def quantise(weight: Tensor, importance: Tensor, bits: int) -> Symmetric:
    """Return a matrix in few bits.

    It depends on the values alone, not on the dtype that holds them; where two scales are about as good, sums in
    another order may prefer the other.

    Args:
        weight: Float `[rows, columns]`.
        importance: E[x_j²], float32 `[columns]`: what an error in column j costs.
        bits: 3 or 4.
    """
    columns = weight.shape[1]
    missing = padded(columns, bits) - columns
    cost = F.pad(importance.to(weight.device, torch.float32), (0, missing)).view(1, -1, group_of(columns, bits))
    levels, scales = zip(*(_quantise(rows, cost, bits) for rows in weight.split(_ROWS)), strict=True)
    return FORMATS[bits]([torch.cat(levels), torch.cat(scales)], (len(weight), columns))


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


def _levels(values: Tensor, scales: Tensor, half: int) -> Tensor:
    # A group of zeros has scale 0.
    steps = values / torch.where(scales == 0, 1, scales.float())[..., None]
    return (steps - 0.5).round().clamp(-half, half - 1)


def _pack(levels: Tensor, bits: int) -> Tensor:
    parts, below = [], 0
    for field in FIELDS[bits]:
        values = (levels >> below) & (2**field - 1)
        places = torch.arange(0, 8, field, dtype=torch.uint8, device=levels.device)[:, None]
        parts.append((values.view(len(levels), -1, 8 // field, field) << places).sum(dim=2).to(torch.uint8).flatten(1))
        below += field
    return torch.cat(parts, dim=1)


def _unpack(packed: Tensor, width: int, bits: int) -> Tensor:
    fields, below = [], 0
    for field, part in zip(FIELDS[bits], packed.split([f * width // 8 for f in FIELDS[bits]], dim=1), strict=True):
        places = torch.arange(0, 8, field, dtype=torch.uint8, device=packed.device)[:, None]
        values = (part.view(len(packed), -1, 1, field) >> places).bitwise_and_(2**field - 1).flatten(1)
        fields.append(values.bitwise_left_shift_(below) if below else values)
        below += field
    levels: Tensor = sum(fields[1:], fields[0])
    return levels


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has products of bfloat16 that are summed in float32: NVIDIA's from Ampere on."""
    return device.type == "cuda" and bool(torch.version.cuda) and torch.cuda.get_device_capability(device) >= (8, 0)


def halves(values: Tensor) -> Tensor:
    """Return two matrices side by side, bfloat16 `[rows, 2 · columns]`, whose sum is `values` `[rows, columns]`.

    They hold it exactly: it has 15 bits, of a level's 4 and a scale's 11.
    """
    both = values.new_empty((len(values), 2, values.shape[1]), dtype=torch.bfloat16)
    high, low = both.unbind(1)
    torch.sub(values, high.copy_(values), out=low)
    return both.flatten(1)


def round_tokens(x: Tensor) -> Tensor:
    """Return x with each token rounded to 255 even steps between ± its largest entry, float32."""
    steps, size = token_steps(x)
    return steps * size


def token_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token of `[..., d]` in 255 even steps between ± its largest entry.

    Returns:
        Whole numbers from -127 to 127, float32 `[..., d]`, and the size of a step, float32 `[..., 1]`.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    # Bounded, for entries so small that the quotient is infinite; times, for kernels to round alike. A number over a
    # tensor would be rounded twice.
    per_step = torch.where(largest > 0, (torch.full_like(largest, 127) / largest).clamp(max=3e38), 0)
    return (x * per_step).round(), largest / 127
