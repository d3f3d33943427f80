"""Speed-ups and how sure they are, on made-up timings: no clock runs here."""

from __future__ import annotations

import math
import random

import pytest

from countdown.benchmark.speedup import Speedup, paired


def test_the_median_of_the_rounds_and_its_inverse():
    dense, sparse = [12.0, 20.0, 13.0, 90.0], [10.0, 10.0, 10.0, 10.0]
    assert paired(dense, sparse).value == pytest.approx(math.sqrt(1.3 * 2.0))
    assert paired(sparse, dense).value == pytest.approx(1 / paired(dense, sparse).value)


def test_what_slows_both_runs_of_a_round_changes_nothing():
    pace = [1, 1, 7, 1, 3, 1, 1, 20]
    found = paired([15.0 * p for p in pace], [10.0 * p for p in pace])
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.narrow


def test_a_few_stalls_move_neither_the_median_nor_a_long_runs_interval():
    dense = [13.0 + 0.01 * place for place in range(38)] + [130.0, 700.0]
    found = paired(dense, [10.0] * 40)
    assert found.value == pytest.approx(1.3, rel=0.02)
    assert found.high < 1.34
    assert found.narrow


@pytest.mark.parametrize(("rounds", "ends"), [(6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (20, (6, 15)), (40, (14, 27))])
def test_the_ends_are_order_statistics(rounds, ends):
    # The textbook's ranks of the 95% interval of a median (Conover, Practical Nonparametric Statistics).
    found = paired([float(place) for place in range(1, rounds + 1)], [1.0] * rounds)
    assert (found.low, found.high) == ends


def test_too_few_rounds_tell_nothing():
    found = paired([3.0] * 5, [1.0] * 5)
    assert (found.low, found.high) == (0.0, math.inf)
    assert not found.narrow
    assert "swings" in found.doubt()


@pytest.mark.parametrize("rounds", [8, 40])
def test_the_interval_holds_as_often_as_it_says(rounds):
    # Noise with a long tail, as other work on a machine makes it; the median ratio is 1.25.
    draw, held, runs = random.Random(0), 0, 1000
    for _ in range(runs):
        noise = [math.exp(draw.choice((0.02, 0.02, 0.5)) * draw.gauss(0, 1)) for _ in range(rounds)]
        found = paired([12.5 * one for one in noise], [10.0] * rounds)
        held += found.low <= 1.25 <= found.high
    assert 0.94 <= held / runs <= 1.0


@pytest.mark.parametrize(
    ("found", "ceiling", "why"),
    [
        (Speedup(1.2, 1.19, 1.21), 1.25, None),
        (Speedup(1.28, 1.24, 1.32), 1.25, None),
        (Speedup(1.28, 1.24, 1.32), None, None),
        (Speedup(14.4, 14, 15), 1.25, "14.40 times dense was measured (95%: 14.00 to 15.00), and its bytes allow 1.25"),
        (Speedup(1.5, 1.1, 1.6), 1.25, "1.50 times dense was measured (95%: 1.10 to 1.60), and its bytes allow 1.25"),
        (Speedup(1.2, 0.5, 4.0), 1.25, "it swings too much to be told (95%: 0.50 to 4.00)"),
        (Speedup(0.4, 0.39, 0.41), 1.25, None),  # slow, and surely so
    ],
)  # fmt: skip
def test_what_cannot_be_is_doubted(found, ceiling, why):
    assert found.doubt(ceiling) == why
