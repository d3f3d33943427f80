"""Results files: the command that is recorded."""

from __future__ import annotations

import sys

from countdown.results import meta


def test_the_command_is_what_measures_again_wherever_results_went(monkeypatch):
    given = ["x", "evaluate", "my model", "--json", "/home/me/r.json", "--commit=abc", "--windows", "4", "--json=-"]
    monkeypatch.setattr(sys, "argv", given)
    assert meta()["command"] == "countdown evaluate 'my model' --windows 4"
    assert meta("python other.py")["command"] == "python other.py"
