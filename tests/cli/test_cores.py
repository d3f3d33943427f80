"""Cores that other processes take."""

from __future__ import annotations

import os

import pytest

from countdown import cli
from countdown.cli import cores

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of four cores, of which others have kept as many busy, for ten seconds."""
    clock = {"now": 0.0}
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cores.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(cores.time, "process_time", lambda: 2 * clock["now"])

    def passes(others: float, seconds: float = 10.0) -> cores.Watch:
        cores.STAT.write_text("cpu  100 0 50 9000 7 0 0 0 0 0\ncpu0 1 1 1\n")
        clock["now"] = 0.0
        watch = cores.Watch()
        clock["now"] = seconds
        busy = int((others + 2) * seconds * TICKS)  # two of them are this process's own
        cores.STAT.write_text(f"cpu  {100 + busy // 2} 0 50 9999 99 0 0 {busy - busy // 2} 0 0\n")
        return watch

    return passes


@pytest.mark.parametrize("others", [0.0, 1.5, 2.0])
def test_cores_of_others_are_counted_without_those_of_this_process(machine, others):
    assert machine(others).taken() == pytest.approx(others, abs=0.01)


@pytest.mark.parametrize(
    ("others", "threads", "said"), [(0.1, 4, False), (0.5, 4, True), (1.5, 2, False), (2.5, 2, True)], ids=str
)
def test_it_is_said_where_threads_had_to_share(machine, monkeypatch, others, threads, said):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    remark = machine(others).remark()
    assert (remark is not None) == said
    assert not said or f"{others} of 4 cores" in remark


def test_nothing_is_said_of_a_moment_or_where_the_system_does_not_say(machine, monkeypatch, tmp_path):
    assert machine(4.0, seconds=1.0).remark() is None
    watch = machine(4.0)
    monkeypatch.setattr(cores, "STAT", tmp_path / "none")
    assert watch.remark() is None


def test_waiting_is_bounded_unless_the_user_has_said_it(monkeypatch):
    for said, expected in (
        ({}, {"GOMP_SPINCOUNT": cores.SPINS, "KMP_BLOCKTIME": "0"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "0"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ):
        monkeypatch.setattr(cores.os, "environ", dict(said))
        cores.wait_briefly()
        assert cores.os.environ == expected


@pytest.mark.parametrize("code", [0, 2])
def test_it_is_said_after_what_was_done_and_not_after_an_error(machine, monkeypatch, capsys, code):
    def app() -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    with pytest.raises(SystemExit):
        cli._run(machine(3.0))
    assert ("3.0 of 4 cores" in capsys.readouterr().err) == (code == 0)
