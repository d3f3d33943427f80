"""Intervals against textbook values."""

from __future__ import annotations

import pytest

from countdown.evaluation.intervals import mean_interval, t_quantile


# Student's t, two-sided 95%, from the tables.
@pytest.mark.parametrize(
    "freedom, expected", [(2, 4.303), (3, 3.182), (5, 2.571), (9, 2.262), (30, 2.042), (1e6, 1.96)]
)
def test_quantile(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=0.01)


def test_interval_of_a_mean():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    # s = 1.5811, t = 2.776 with 4 degrees of freedom.
    assert (found.low, found.high) == pytest.approx((3 - 1.963, 3 + 1.963), abs=0.005)


def test_equal_values_leave_no_doubt():
    found = mean_interval([0.25] * 7)
    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


def test_two_values_have_no_interval():
    found = mean_interval([0.0, 1.0])
    assert (found.low, found.mean, found.high) == (None, 0.5, None)
