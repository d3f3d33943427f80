"""Intervals: what they cover, and that they answer to what makes a loss uncertain."""

from __future__ import annotations

import math

import pytest
import torch

from countdown.comparison.bootstrap import loss_interval, prediction_intervals

WINDOWS, OTHERS = 12, 8


def drawn(cells: int, windows: int, seed: int, spread: float = 0.02) -> torch.Tensor:
    """Differences by cell and window around equal means, in part the same for all cells."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, windows, generator=generator)
    return 0.03 + spread * (common + torch.randn(cells, windows, generator=generator))


def test_the_interval_of_a_loss_is_around_it():
    d = drawn(1, 200, seed=0)[0].tolist()
    low, high = loss_interval(d)
    loss = math.expm1(sum(d) / len(d))
    error = torch.tensor(d).std().item() / math.sqrt(len(d))
    assert low < loss < high
    # Of 200 windows, the bootstrap's is the normal one.
    assert (high - low) / (2 * 1.96 * error * (1 + loss)) == pytest.approx(1, abs=0.06)


def test_windows_that_differ_alike_leave_no_doubt():
    assert loss_interval([0.01] * 8) == pytest.approx((math.expm1(0.01),) * 2)
    assert prediction_intervals([[0.01] * 8], 8)[0] == pytest.approx((math.expm1(0.01),) * 2)


def test_intervals_are_the_same_every_time_and_answer_to_the_seed():
    d = drawn(3, WINDOWS, seed=1).tolist()
    assert prediction_intervals(d, OTHERS, seed=3) == prediction_intervals(d, OTHERS, seed=3)
    assert prediction_intervals(d, OTHERS, seed=3) != prediction_intervals(d, OTHERS, seed=4)


def test_other_windows_are_less_certain_than_the_mean():
    d = drawn(1, WINDOWS, seed=2).tolist()
    mean, other = loss_interval(d[0]), prediction_intervals(d, OTHERS)[0]
    assert other[0] < mean[0] < mean[1] < other[1]
    fewer = prediction_intervals(d, 2)[0]
    assert fewer[1] - fewer[0] > other[1] - other[0]


def test_a_pick_among_many_is_less_certain_than_a_cell_alone():
    d = drawn(20, WINDOWS, seed=3).tolist()
    alone, among = prediction_intervals(d[:1], OTHERS)[0], prediction_intervals(d, OTHERS)[0]
    assert among[0] < alone[0] < alone[1] < among[1]


def test_a_cell_that_is_dense_to_the_bit_changes_nothing_for_the_others():
    d = drawn(2, WINDOWS, seed=4).tolist()
    assert prediction_intervals([*d, [0.0] * WINDOWS], OTHERS)[:2] == prediction_intervals(d, OTHERS)


@pytest.mark.parametrize("cells", [1, 15])
def test_the_picked_cell_is_covered_as_often_as_stated(cells, monkeypatch):
    # All are alike, so picking the least loss picks the luckiest: without care for that, far fewer would be covered.
    monkeypatch.setattr("countdown.comparison.bootstrap.RESAMPLES", 1000)
    covered = naive = 0
    trials = 150
    for trial in range(trials):
        d = drawn(cells, WINDOWS + OTHERS, seed=trial)
        seen, unseen = d[:, :WINDOWS], d[:, WINDOWS:]
        picked = int(seen.mean(dim=1).argmin())
        loss = math.expm1(float(unseen[picked].mean()))
        low, high = prediction_intervals(seen.tolist(), OTHERS, seed=trial)[picked]
        covered += low <= loss <= high
        low, high = loss_interval(seen[picked].tolist())
        naive += low <= loss <= high
    assert covered / trials > 0.9
    assert naive / trials < 0.85


def test_a_useless_cell_has_a_wide_interval_and_does_not_stop_the_others():
    useless, good = [1.0, 600.0, 2.0, 500.0], [0.01, 0.02, 0.03, 0.02]
    (_, high), (low, _) = prediction_intervals([useless, good], 4)
    assert high == math.inf
    assert low < math.expm1(0.02)
