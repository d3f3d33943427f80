"""The sparse configurations of a comparison by method: those that differ in sparsity alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from countdown.comparison.comparison import Cell


@dataclass(frozen=True)
class Series:
    """Sparse configurations that differ in sparsity alone, the least sparse first.

    Args:
        name: Their label without the sparsity.
        index: Place among the comparison's series; it decides colour and marker, the same in every plot.
        cells: The configurations.
    """

    name: str
    index: int
    cells: list[Cell]


def all_series(cells: Iterable[Cell]) -> list[Series]:
    """Return the sparse configurations by what else was set, in the order of the comparison."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.kind == "sparse":
            # By name as well: two recipe files may differ in nothing but sparsity.
            key = json.dumps([_name(cell), _without_sparsity(cell.settings)], sort_keys=True)
            groups.setdefault(key, []).append(cell)
    return [
        Series(_name(group[0]), index, sorted(group, key=lambda cell: cell.sparsity or 0.0))
        for index, group in enumerate(groups.values())
    ]


def _without_sparsity(settings: Any) -> Any:
    """Return settings without sparsities, also in the entries of a recipe."""
    if isinstance(settings, dict):
        return {key: _without_sparsity(value) for key, value in settings.items() if key != "sparsity"}
    return [_without_sparsity(value) for value in settings] if isinstance(settings, list) else settings


def _name(cell: Cell) -> str:
    return re.sub(r"\s+at\s+[\d.]+%?$", "", cell.label)
