"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from countdown.comparison import formats as f


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (f.number(1234.5, 1), "1,234.5"),
        (f.number(None), "–"),
        (f.number(math.nan), "–"),
        (f.number(-math.inf), "-∞"),
        (f.number(-1.5, 1), "-1.5"),
        (f.digits_apart(0.996, 1, 2), 3),
        (f.digits_apart(1.0, 1, 2), 2),
        (f.digits_apart(1.31, 1, 2), 2),
        (f.digits_apart(-0.0004, 0, 1), 4),
        (f.digits_apart(1e-30, 0, 1), 8),
        (f.digits_apart(math.nan, 0, 1), 1),
        (f.digits_apart(None, 0, 1), 1),
        (f.share(0.615), "62%"),
        (f.share(None), "–"),
        (f.change(0.016), "+1.6%"),
        (f.change(-0.016), "-1.6%"),
        # An interval from -0.04% to -0.01% does not hold 0.
        (f.change(-0.0001), "-0.0%"),
        (f.change(-0.0), "+0.0%"),
        (f.change(math.inf), "+∞%"),
        (f.interval((-0.01, 0.02)), "-1.0% to +2.0%"),
        (f.interval((math.nan, 0.02)), ""),
        (f.interval(None), ""),
        (f.times(1.314), "1.31×"),
        (f.times(0.996, 3), "0.996×"),
        (f.times(None), "–"),
        (f.count(1, "window"), "1 window"),
        (f.count(2000, "window"), "2,000 windows"),
        (f.listed([]), ""),
        (f.listed(["a"]), "a"),
        (f.listed(["a", "b", "c"]), "a, b and c"),
        (f.described([{"source": "x", "in_all": 3}, "y"]), "source: x, in all: 3; y"),
    ],
)
def test_formats(made, expected):
    assert made == expected
