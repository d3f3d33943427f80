"""What of crossed parameters is left to the slow tests."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from crossing import covering, crossed


@pytest.mark.parametrize("sizes", [[4, 2, 3, 4], [3, 11, 2], [2, 5], [1, 1, 3]])
def test_all_pairs_occur_in_few_combinations(sizes):
    chosen = covering(sizes)
    for first, second in combinations(range(len(sizes)), 2):
        seen = {(places[first], places[second]) for places in chosen}
        assert seen == set(product(range(sizes[first]), range(sizes[second])))
    largest = sorted(sizes)[-2:]
    assert len(chosen) <= 1.5 * largest[0] * largest[1]


def test_no_combination_is_lost():
    mark = crossed(a=[1, 2], b="xy", c=[None, 0.5])
    assert mark.args[0] == ["a", "b", "c"]
    cases = mark.args[1]
    assert [case.values for case in cases] == list(product([1, 2], "xy", [None, 0.5]))
    assert {case.id: len(case.marks) for case in cases}.items() >= {"1-x-None": 0}.items()
    assert sum(not case.marks for case in cases) == 4
