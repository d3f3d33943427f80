"""Several parameters at once: all pairs of their values in every run, all combinations among the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def crossed(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test over all combinations; those that bring no new pair of values are marked `slow`.

    A fault is nearly always one of a single value or of two together. With two parameters nothing is slow.
    """
    values = [list(axis) for axis in axes.values()]
    needed = covering([len(axis) for axis in values])
    cases = []
    for places in product(*(range(len(axis)) for axis in values)):
        case = [axis[place] for axis, place in zip(values, places, strict=True)]
        marks = () if places in needed else pytest.mark.slow
        cases.append(pytest.param(*case, marks=marks, id="-".join(map(str, case))))
    return pytest.mark.parametrize(list(axes), cases)


def covering(sizes: list[int]) -> set[tuple[int, ...]]:
    """Return few combinations of places in axes of these sizes, in which all pairs of places of two axes occur."""
    left = set().union(*(pairs(places) for places in product(*map(range, sizes))))
    chosen = set()
    while left:
        best = max(product(*map(range, sizes)), key=lambda places: len(pairs(places) & left))
        chosen.add(best)
        left -= pairs(best)
    return chosen


def pairs(places: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(places), 2))
