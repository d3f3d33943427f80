"""Which cell is recommended, and what is said about it."""

from __future__ import annotations

import math

import pytest

from countdown.comparison.comparison import Cell, Quality, Speed
from countdown.comparison.grid import Wish
from countdown.comparison.recommend import nearest, recommend
from countdown.errors import ConfigError

DENSE_NLL = [2.0, 2.5, 3.0, 2.2]


def cell(
    label: str,
    loss: float,
    speedup: float | None = None,
    *,
    kind: str = "sparse",
    read: float = 0.5,
    interval: tuple[float, float] | None = None,
) -> Cell:
    """A cell whose windows all lose a little more or less than `loss`, and whose interval is 1% to either side."""
    shift = math.log1p(loss)
    nll = [d + shift + wobble for d, wobble in zip(DENSE_NLL, (0.001, -0.001, 0.002, -0.002), strict=True)]
    quality = Quality(100, 10.0 * (1 + loss), loss, (loss - 0.01, loss + 0.01), 0.0, 1.0, window_nll=nll)
    speed = None if speedup is None else Speed(100 * speedup, speedup, 1000.0, interval=interval)
    return Cell(label, kind, {}, 0.5 if kind == "sparse" else None, read, read, quality, speed)


def dense(speed: float | None = 1.0) -> Cell:
    quality = Quality(100, 10.0, 0.0, (0.0, 0.0), 0.0, 1.0, window_nll=DENSE_NLL)
    return Cell("dense", "dense", {}, None, 1.0, 1.0, quality, speed and Speed(100.0, speed, 1000.0))


CELLS = [
    dense(),
    cell("careful", 0.005, 1.1),
    cell("near the limit", 0.018, 1.3),
    cell("bold", 0.2, 1.8),
    cell("slow", 0.001, 0.9),
    cell("int8", 0.006, 1.2, kind="quantised"),
]


@pytest.mark.parametrize(
    ("wish", "label"),
    [
        # 1.8% loses at most 2.8%, by the upper end of its interval.
        (Wish(max_loss=0.02), "int8"),
        (Wish(max_loss=0.03), "near the limit"),
        (Wish(max_loss=0.5), "bold"),
        (Wish(max_loss=0.001), "dense"),
        (Wish(min_speedup=1.05), "careful"),
        (Wish(min_speedup=1.15), "int8"),
        (Wish(min_speedup=1.5), "bold"),
        (Wish(max_loss=0.03, min_speedup=1.25), "near the limit"),
        (Wish(), "bold"),  # 1.8 / 1.2 is more than 1.3 / 1.018
    ],
)
def test_what_is_picked(wish, label):
    assert recommend(CELLS, wish, 4).label == label


@pytest.mark.parametrize("wish", [Wish(min_speedup=2.0), Wish(max_loss=0.02, min_speedup=1.5)])
def test_nothing_where_nothing_fits(wish):
    assert recommend(CELLS, wish, 4) is None
    assert "bold, 1.80 times as fast" in nearest(CELLS, wish)


def test_nothing_slower_than_dense_is_picked():
    cells = [dense(), cell("slow", 0.001, 0.9), cell("int4", 0.01, 0.7, kind="quantised")]
    advice = recommend(cells, Wish(), 4)
    assert (advice.label, advice.expected_loss, advice.interval) == ("dense", 0.0, (0.0, 0.0))
    assert advice.reason.startswith("Stay dense: of 2 configurations, none is surely better")


def test_without_speed_bytes_decide():
    cells = [dense(None), cell("half", 0.01, read=0.5), cell("most", 0.0, read=0.9)]
    advice = recommend(cells, Wish(max_loss=0.05), 4)
    assert advice.label == "half"
    assert "2.00 times fewer weight bytes" in advice.reason


def test_a_cell_without_speed_among_those_with_is_not_picked():
    cells = [dense(), cell("untimed", 0.0, None, read=0.1), cell("timed", 0.01, 1.2)]
    assert recommend(cells, Wish(max_loss=0.1), 4).label == "timed"


@pytest.mark.parametrize(
    ("unreliable", "why"),
    [
        # By bytes 1.25 is the most there is; what comes out of a busy machine is another thing.
        ({"speedup": 14.38, "interval": (13.0, 15.0)}, "its bytes allow 1.25"),
        ({"speedup": 1.2, "interval": (0.6, 3.1)}, "it swings too much"),
    ],
)
def test_a_speed_up_that_cannot_be_is_not_recommended(unreliable, why):
    cells = [dense(), cell("impossible", 0.0, read=0.8, **unreliable), cell("good", 0.01, 1.2, interval=(1.19, 1.21))]
    assert why in cells[1].doubt
    assert cells[1].record()["unreliable"] == cells[1].doubt
    for wish in (Wish(), Wish(max_loss=0.5), Wish(min_speedup=1.1)):
        advice = recommend(cells, wish, 4)
        assert advice.label == "good"
        assert advice.reason.endswith("Left out, as their speed-ups are unreliable: impossible.")
    assert recommend(cells[:2], Wish(), 4).label == "dense"
    assert recommend(cells[:2], Wish(min_speedup=1.1), 4) is None


def test_what_lies_just_above_its_ceiling_is_noise_and_not_impossible():
    assert cell("at the ceiling", 0.0, 1.28, read=0.8, interval=(1.24, 1.30)).doubt is None


def test_what_may_be_no_faster_than_dense_is_not_recommended():
    cells = [dense(), cell("perhaps", 0.0, 1.05, interval=(0.97, 1.2))]
    assert recommend(cells, Wish(), 4).label == "dense"
    assert recommend(cells, Wish(max_loss=0.1), 4).label == "dense"


def test_a_least_speed_up_is_kept_by_the_whole_interval():
    cells = [dense(), cell("perhaps", 0.0, 1.5, interval=(1.35, 1.6)), cell("surely", 0.05, 1.45, interval=(1.41, 1.5))]
    advice = recommend(cells, Wish(min_speedup=1.4), 4)
    assert advice.label == "surely"
    assert "1.45 times as fast as dense (95%: 1.41 to 1.50)" in advice.reason


def test_failed_cells_take_no_part():
    failed = Cell("failed", "sparse", {}, 0.5, error="out of memory")
    assert recommend([dense(), failed, cell("good", 0.01, 1.2)], Wish(), 4).label == "good"


def test_the_interval_holds_the_expected_loss_and_the_reason_the_rival():
    advice = recommend(CELLS, Wish(max_loss=0.02), 4)
    assert advice.interval[0] < advice.expected_loss < advice.interval[1]
    assert "Best of the sparse ones: careful, 1.10 times as fast" in advice.reason


def test_a_rival_that_does_not_fulfil_the_wish_is_called_so():
    cells = [dense(), cell("careful", 0.005, 1.1), cell("int4", 0.3, 1.9, kind="quantised")]
    assert "No quantised one fulfils it; nearest in loss: int4" in recommend(cells, Wish(max_loss=0.02), 4).reason


def test_without_a_wish_the_rival_that_may_be_better_is_named_not_the_nearest_in_loss():
    int4 = cell("int4", 0.01, 1.04, kind="quantised", interval=(0.81, 1.08))
    int8 = cell("int8", 0.001, 0.74, kind="quantised", interval=(0.7, 0.8))
    reason = recommend([dense(), cell("sparse", 0.1, 1.3, interval=(1.2, 1.4)), int4, int8], Wish(), 4).reason
    assert "No quantised one is surely faster than dense, as far as measured; the best: int4, 1.04 times" in reason


def test_a_least_speed_up_that_is_missed_names_the_fastest():
    cells = [
        dense(),
        cell("sparse", 0.1, 1.5),
        cell("int4", 0.0, 1.3, kind="quantised"),
        cell("int8", 0.0, 0.8, kind="quantised"),
    ]
    assert "nearest in speed: int4" in recommend(cells, Wish(min_speedup=1.4), 4).reason


@pytest.mark.parametrize("wish", [{"max_loss": 0.0}, {"max_loss": math.nan}, {"min_speedup": 1.0}])
def test_wishes_that_mean_nothing(wish):
    with pytest.raises(ConfigError, match="expected more than"):
        Wish(**wish)
