"""`countdown compare` as its users meet it."""

from __future__ import annotations

import json

import pytest
from test_cli import run

from countdown.comparison import session
from countdown.comparison.comparison import Comparison

FAST = ("--windows", "4", "--tokens", "1024", "--no-speed")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTDOWN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "SAMPLE_TOKENS", 4)
    return tmp_path


def test_compare(model_folder, folder):
    arguments = ("compare", model_folder, *FAST, "--method", "cats", "--sparsity", "0.5", "-o", "out")
    result = run(*arguments, "--json", "-", "--max-loss", "1000", cwd=folder)
    assert result.returncode == 0, result.stderr
    found = Comparison.load(folder / "out")
    assert json.loads(json.dumps(found.document())) == json.loads(result.stdout)
    # The rows of this model are not whole groups of int4: that cell fails, the others do not.
    assert [cell.label for cell in found.cells if cell.error] == ["int4"]
    assert "int4 failed: int4 takes rows of a multiple of 32" in result.stderr
    assert "Recommended: int8" in result.stderr
    again = run(*arguments, "-q", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(" " * 10)
    assert "cats at 0.5" in again.stdout
    assert "written to out" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "catz"), "Did you mean 'cats'?"),
        (("--sparsity", "50"), "expected 0 ≤ sparsity < 1"),
        (("--min-speedup", "2", "--no-speed"), "speed is not measured"),
        (("--text", "nowhere.txt"), "neither a file nor one of"),
        (("--max-loss", "0"), "the largest loss is 0.0"),
        (("--method", "missing.yaml"), "recipe missing.yaml cannot be read"),
    ],
)
def test_mistakes(model_folder, folder, arguments, message):
    result = run("compare", model_folder, *arguments, cwd=folder)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / "tiny-llama-comparison").exists()


def test_what_is_found_is_printed_as_it_comes(model_folder, folder):
    arguments = ("--windows", "4", "--tokens", "1024", "--no-speed", "--method", "cats", "--quick", "-o", "out")
    result = run("compare", model_folder, *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("measuring cats at 0.5 (2 of 5, about "))
    assert lines[place - 1].startswith("dense: perplexity ")
    assert any(line.startswith("cats at 0.7: perplexity ") for line in lines)
    assert "This comparison is quick, and rough: 4 windows, calibration on 1024 tokens" in result.stdout
    assert "Recommended roughly: " in result.stdout
