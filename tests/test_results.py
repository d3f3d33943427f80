"""Results files: the command that is recorded."""

from __future__ import annotations

import json
import math
import sys

import pytest

from countdown.results import meta, write


def test_the_command_is_what_measures_again_wherever_results_went(monkeypatch):
    given = ["x", "evaluate", "my model", "--json", "/home/me/r.json", "--commit=abc", "--windows", "4", "--json=-"]
    monkeypatch.setattr(sys, "argv", given)
    assert meta()["command"] == "countdown evaluate 'my model' --windows 4"
    assert meta("python other.py")["command"] == "python other.py"


def test_what_json_does_not_have_is_null(tmp_path):
    found = {"a": math.nan, "b": [1.5, -math.inf], "c": ({"d": math.inf}, "NaN", 3, True, None)}
    write(tmp_path / "r.json", found)
    text = (tmp_path / "r.json").read_text()
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}
    assert json.loads(text, **refuse) == {"a": None, "b": [1.5, None], "c": [{"d": None}, "NaN", 3, True, None]}
