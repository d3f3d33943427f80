"""What of a comparison the plots show: one sparsity of each method, the front."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from countdown.comparison.comparison import Cell, Layer
from countdown.comparison.series import Series

# Plots by layer show one configuration of each method: the one nearest this sparsity.
SHOWN_SPARSITY = 0.5
# More lines in one plot cannot be told apart.
MOST_LINES = 6


@dataclass(frozen=True)
class Shown:
    """One configuration of a series."""

    series: Series
    cell: Cell


def by_layer(series: Sequence[Series]) -> list[Shown]:
    """Return of each series the configuration nearest `SHOWN_SPARSITY` whose layers were measured.

    Of more than `MOST_LINES` those that lose least.
    """
    shown = [Shown(one, cell) for one in series if (cell := _nearest(one.cells))]
    best = sorted(shown, key=lambda each: each.cell.quality.loss if each.cell.quality else math.inf)[:MOST_LINES]
    return [each for each in shown if each in best]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other beats, from small gain to large.

    Args:
        points: (gain, loss) of each: more gain is better, less loss is better.
    """
    best, kept = math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept[::-1]


def by_block(layers: Sequence[Layer], values: Sequence[float]) -> dict[int, float]:
    """Return the mean of a block's modules by block number, the first number in a module's name, or its place."""
    blocks: dict[int, list[float]] = {}
    for place, (layer, value) in enumerate(zip(layers, values, strict=True)):
        found = re.search(r"\d+", layer.name)
        blocks.setdefault(int(found.group()) if found else place, []).append(value)
    return {block: fmean(found) for block, found in sorted(blocks.items())}


def finite(*values: float | None) -> bool:
    """Return whether all of them were measured and can be drawn."""
    return all(value is not None and math.isfinite(value) for value in values)


def _nearest(cells: Iterable[Cell]) -> Cell | None:
    measured = [cell for cell in cells if cell.quality and cell.quality.layers and cell.sparsity is not None]
    return min(measured, key=lambda cell: abs((cell.sparsity or 0.0) - SHOWN_SPARSITY), default=None)
