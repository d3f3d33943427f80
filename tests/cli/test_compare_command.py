"""`countdown compare` as its users meet it."""

from __future__ import annotations

import json

import pytest
from test_cli import run

from countdown.comparison import session
from countdown.comparison.comparison import Comparison

TASK = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: documents.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{goal}}"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
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
        (("--limit", "4"), "limit belongs to tasks, which are not given"),
        (("--tasks", "piqa", "--tasks-dir", "nope"), "the folder of tasks nope does not exist"),
    ],
)
def test_mistakes(model_folder, folder, arguments, message):
    result = run("compare", model_folder, *arguments, cwd=folder)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / "tiny-llama-comparison").exists()


@pytest.fixture
def local_task(folder, monkeypatch):
    """A task in the folder `tasks`, whose documents are in the folder where the command line runs."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    documents = [{"goal": f"count to {n}", "sol1": "one", "sol2": "two, three", "label": n % 2} for n in range(5)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "choice.yaml").write_text(TASK)


@pytest.mark.usefixtures("local_task")
def test_tasks(model_folder, folder):
    arguments = ("compare", model_folder, *FAST, "--method", "cats", "--sparsity", "0.5", "-o", "out")
    result = run(
        *arguments, "--tasks", "choice", "--tasks-dir", "tasks", "--limit", "4", "--batch-size", "2", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    found = Comparison.load(folder / "out")
    assert [len(cell.tasks) for cell in found.cells] == [1, 1, 1, 0]  # int4 does not take this model
    one = found.cell("cats at 0.5").scored("choice", "acc")
    assert (one.documents, found.meta["tasks"]["choice"]["batch_size"]) == (4, 2)
    assert "scoring cats at 0.5 on choice\n" in result.stderr
    assert f"choice acc {one.value:.4f}\n" in result.stderr
    assert "lm_eval" not in result.stderr
    assert "Running loglikelihood requests" not in result.stderr  # a bar, for terminals
    assert "choice, acc: the first 4 documents" in result.stdout
    reported = run("report", "out", cwd=folder)
    assert reported.returncode == 0, reported.stderr
    assert "choice, acc: the first 4 documents" in (folder / "out" / "report.html").read_text(encoding="utf-8")


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
