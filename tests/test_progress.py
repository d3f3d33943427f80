"""How far along work is and how long it takes, by a clock that tests turn."""

from __future__ import annotations

import pytest

from countdown import progress
from countdown.progress import Steps, about, track


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock


def test_steps_take_what_others_of_their_kind_took(clock):
    def do(steps, kind, seconds, *, fails=False):
        with steps.step(kind):
            clock.now += seconds
            if fails:
                raise ValueError("it fails")

    steps = Steps(["long", "short", "short", "long", "short", "new"])
    assert str(steps) == "1 of 6"
    do(steps, "long", 100)
    # Of kinds that none was seen of, as of the kinds that were.
    assert steps.seconds == 5 * 100
    do(steps, "short", 10)
    assert steps.seconds == 10 + 100 + 10 + 55
    assert str(steps) == "3 of 6, about 3 min left"
    with pytest.raises(ValueError, match="it fails"):
        do(steps, "short", 30, fails=True)
    assert str(steps).startswith("4 of 6, about ")
    assert steps.left == ["long", "short", "new"]


def test_a_step_of_a_known_size_takes_as_much_longer(clock):
    steps = Steps(["small", "small", "whole"], {"whole": 5.0})
    with steps.step("small"):
        clock.now += 10
    assert steps.seconds == 10 + 50


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about 1 s"), (44.4, "about 44 s"), (360, "about 6 min"), (5500, "about 92 min"), (9000, "about 2.5 h")],
)
def test_times_as_people_say_them(seconds, words):
    assert about(seconds) == words


def test_lines_say_how_long_the_rest_takes(clock, capsys):
    for _ in track(range(4), "counting"):
        clock.now += 30
    assert capsys.readouterr().err.splitlines() == [
        "counting: 4 steps",
        "counting: 1 of 4, about 90 s left",
        "counting: 2 of 4, about 60 s left",
        "counting: 3 of 4, about 30 s left",
        "counting: done",
    ]


def test_short_work_says_little(clock, capsys):
    for _ in track(range(100), "counting"):
        clock.now += 0.05
    assert capsys.readouterr().err.splitlines() == ["counting: 100 steps", "counting: done"]
    for _ in track(range(100), "timing", still=True):
        clock.now += 0.05
    assert capsys.readouterr().err == ""
    for _ in track(range(2), "timing", still=True):
        clock.now += 20
    assert capsys.readouterr().err == "timing: 1 of 2, about 20 s left\n"


def test_nothing_is_shown_where_it_is_not_wanted(clock, capsys):
    assert list(track([1, 2], "counting", show=False)) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("still", [False, True])
def test_a_bar_in_a_terminal_counts_and_leaves_nothing(monkeypatch, capsys, still):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(track([7, 8], "counting", still=still)) == [7, 8]
    shown = capsys.readouterr().err
    assert "counting" in shown
    assert "2/2" in shown
