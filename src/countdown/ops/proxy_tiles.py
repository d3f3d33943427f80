"""4-bit proxies in tiles, the form that kernels for CPUs read.

A tile is 16 neurons whose words of 4 bytes stand side by side: levels uint8 `[tiles, words, 16, 4]`, scales float16
`[tiles, groups, 16]`. One vector instruction then multiplies a word of each neuron with the same eight entries of the
token, and no sum runs across a vector. Beyond the last neuron a tile has zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

TILE = 16


def tile_shapes(levels: tuple[int, int], scales: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes in tiles of levels `[h, 4 · words]` and scales `[h, groups]`."""
    tiles = -(-levels[0] // TILE)
    return (tiles, levels[1] // 4, TILE, 4), (tiles, scales[1], TILE)


def are_tiles(levels: Tensor) -> bool:
    """Return whether levels are in tiles, not in rows."""
    return levels.dim() == 4


def in_tiles(proxy: list[Tensor]) -> list[Tensor]:
    """Return levels and scales of gate and up in tiles, given in either form."""
    if are_tiles(proxy[0]):
        return proxy
    return [*_tiled(proxy[0], proxy[1]), *_tiled(proxy[2], proxy[3])]


def in_rows(proxy: list[Tensor], h: int) -> list[Tensor]:
    """Return levels `[h, 4 · words]` and scales `[h, groups]` of gate and up, given in either form."""
    if not are_tiles(proxy[0]):
        return proxy
    return [*_in_rows(proxy[0], proxy[1], h), *_in_rows(proxy[2], proxy[3], h)]


def _tiled(levels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    missing = (0, 0, 0, -len(levels) % TILE)
    tiles = _turned(F.pad(levels, missing).view(torch.int32), TILE)
    return tiles.view(torch.uint8).unflatten(2, (TILE, 4)), _turned(F.pad(scales, missing), TILE)


def _in_rows(levels: Tensor, scales: Tensor, h: int) -> tuple[Tensor, Tensor]:
    words, groups = levels.shape[1], scales.shape[1]
    rows = _turned(levels.flatten(0, 1).flatten(1).view(torch.int32), words)
    return rows.view(torch.uint8).flatten(0, 1)[:h], _turned(scales.flatten(0, 1), groups).flatten(0, 1)[:h]


def _turned(matrix: Tensor, rows: int) -> Tensor:
    """Return each block of so many rows of a matrix transposed: `[blocks · rows, n]` as `[blocks, n, rows]`."""
    # Not `contiguous`, which leaves the strides of a dimension of 1 as they are.
    turned: Tensor = matrix.unflatten(0, (-1, rows)).mT.clone(memory_format=torch.contiguous_format)
    return turned
