"""Configurations scored on a task of lm-eval: the same documents for each, kept, refused and written. No hub."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from lm_eval.api.metrics import mean_stderr

import countdown
from countdown.cli.printing import print_comparison
from countdown.comparison import session
from countdown.comparison.comparison import Comparison
from countdown.comparison.tasks import Task
from countdown.errors import ConfigError
from countdown.integrations.lm_eval import CountdownLM, evaluate_tasks, load_tasks, score_tasks
from tiny import byte_tokenizer, llama

DOCUMENTS = [
    {"goal": f"count to {n}", "sol1": "one " * (n % 3 + 1), "sol2": f"two, {n} more", "label": n % 2} for n in range(12)
]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
BYTES = """
task: bytes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{goal}}}} {{{{sol1}}}}"
metric_list:
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """What datasets converts goes to a folder of the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def write_tasks(folder: Path, documents: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name in ("choice", "again"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, data=data))
    (folder / "bytes.yaml").write_text(BYTES.format(data=data))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A small Llama whose rows int4 takes, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama(hidden_size=64, intermediate_size=96, head_dim=32, num_hidden_layers=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory, text) -> Path:
    """A cache, a text and task files, which tests share."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text(text, encoding="utf-8")
    write_tasks(place / "tasks", DOCUMENTS)
    return place


@pytest.fixture
def run(model, place, monkeypatch):
    """Compare on tasks; `run.said` is what was done."""
    monkeypatch.setenv("COUNTDOWN_CACHE", str(place / "cache"))
    monkeypatch.setattr(session, "SAMPLE_TOKENS", 4)

    def run(**more) -> Comparison:
        run.said = []
        settings = {"tasks": "choice", "tasks_dir": place / "tasks", "limit": 10, "speed": False, "progress": False}
        settings |= {"methods": ["cats"], "sparsities": [0.6], "windows": 4, "tokens": 1024}
        settings |= {"text": str(place / "text.txt"), "say": run.said.append} | more
        return countdown.compare(model, **settings)

    return run


def scored(said: list[str]) -> list[str]:
    return [line.removeprefix("scoring ") for line in said if line.startswith("scoring ")]


def test_every_configuration_is_scored_on_the_same_documents(run):
    found = run()
    assert [cell.label for cell in found.cells] == ["dense", "cats at 0.6", "int8", "int4"]
    assert [cell.error for cell in found.cells] == [None] * 4
    assert found.metrics() == [("choice", "acc"), ("choice", "acc_norm")]
    dense, sparse, int8, int4 = (cell.scored("choice", "acc") for cell in found.cells)
    assert {one.documents for one in (dense, sparse, int8, int4)} == {10}
    assert (dense.difference, dense.difference_interval) == (0.0, (0.0, 0.0))
    for one in (sparse, int8, int4):
        assert one.difference == pytest.approx(one.value - dense.value)
        assert one.difference_interval[0] <= one.difference <= one.difference_interval[1]


def test_the_numbers_are_those_of_evaluate(run, model, place):
    cell = run().cell("cats at 0.6")
    loaded = countdown.from_pretrained(model, device="cpu")
    method = countdown.method("cats", sparsity=0.5)
    calibration = countdown.load_text("python-docs", "calibration")
    profile = countdown.calibrate(loaded, byte_tokenizer(), calibration, method, tokens=1024, progress=False)
    countdown.sparsify_(loaded, profile.with_settings(sparsity=0.6))
    tasks = load_tasks(["choice"], place / "tasks")
    for one in evaluate_tasks(loaded, byte_tokenizer(), tasks, limit=10, progress=False).scores:
        result = cell.scored("choice", one.name)
        assert (result.value, result.stderr) == (one.sparse, one.sparse_stderr)
        assert (result.difference, result.difference_interval) == (one.difference, (one.low, one.high))


def test_standard_errors_are_those_of_lm_eval(model, place):
    (task,) = load_tasks(["choice"], place / "tasks")
    loaded = countdown.from_pretrained(model, device="cpu")
    found = score_tasks(CountdownLM(loaded, byte_tokenizer(), mode="dense", progress=False), [task])
    values = found["choice", "acc", "none"].by_document
    assert 0 < sum(values) < len(values)
    assert found["choice", "acc", "none"].stderr == pytest.approx(mean_stderr(values))


def test_a_metric_that_is_no_mean_has_neither_standard_error_nor_interval(run):
    found = run(tasks=["bytes"], quantised=False)
    dense, sparse = (cell.scored("bytes", "byte_perplexity") for cell in found.cells)
    assert sparse.value != dense.value
    assert sparse.difference == sparse.value - dense.value
    assert (sparse.stderr, sparse.difference_interval, sparse.documents) == (None, None, 10)


def test_a_second_run_loads_nothing(run, monkeypatch):
    first = run()
    monkeypatch.setattr(session, "load_model", None)
    assert run().cells == first.cells
    assert run.said == []


def test_one_more_task_scores_only_that(run):
    run()
    found = run(tasks=["choice", "again"])
    assert scored(run.said) == [f"{label} on again" for label in ("dense", "cats at 0.6", "int8", "int4")]
    for cell in found.cells:
        assert cell.scored("again", "acc").value == cell.scored("choice", "acc").value


@pytest.mark.parametrize("change", [{"limit": 9}, {"limit": None}, {"batch_size": 2}, {"tokens": 2048}])
def test_what_scores_depend_on_is_in_the_key(run, change):
    run(quantised=False)
    run(quantised=False, **change)
    assert scored(run.said) == ["dense on choice", "cats at 0.6 on choice"]


def test_windows_and_text_are_not_in_the_key(run):
    run(quantised=False)
    run(quantised=False, windows=5)
    assert scored(run.said) == []


def test_other_documents_are_another_task(run, tmp_path):
    settings = {"tasks_dir": write_tasks(tmp_path / "tasks", DOCUMENTS), "quantised": False}
    run(**settings)
    run(**settings)
    assert scored(run.said) == []
    write_tasks(tmp_path / "tasks", [DOCUMENTS[0] | {"label": 1}, *DOCUMENTS[1:]])
    run(**settings)
    assert scored(run.said) == ["dense on choice", "cats at 0.6 on choice"]


def test_an_interrupted_comparison_continues_at_the_task(run, monkeypatch):
    real = Task.score

    def interrupted(self, model, *arguments, **more):
        if self.name == "again" and countdown.modules.sparse_modules(model):
            raise KeyboardInterrupt
        return real(self, model, *arguments, **more)

    settings = {"methods": ["cats"], "sparsities": [0.55], "tasks": ["choice", "again"], "limit": 8, "quantised": False}
    monkeypatch.setattr(Task, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    monkeypatch.setattr(Task, "score", real)
    monkeypatch.setattr(session, "measure_quality", None)
    found = run(**settings)
    assert scored(run.said) == ["cats at 0.55 on again"]
    assert found.cell("cats at 0.55").error is None


def test_a_task_that_fails_for_one_does_not_stop_the_others(run, monkeypatch):
    real = Task.score

    def failing(self, model, *arguments, **more):
        if countdown.modules.sparse_modules(model):
            raise RuntimeError("no memory")
        return real(self, model, *arguments, **more)

    monkeypatch.setattr(Task, "score", failing)
    found = run(limit=7, quantised=False)
    sparse = found.cell("cats at 0.6")
    assert (sparse.error, sparse.tasks) == ("RuntimeError: no memory", [])
    assert sparse.quality is not None
    assert [record["choice/acc"] is None for record in found.records()] == [False, True]


def test_a_damaged_score_is_measured_again(run, place):
    first = run(limit=6, quantised=False)
    for file in (place / "cache" / "cells").iterdir():
        kept = json.loads(file.read_text())
        if kept["key"]["part"] == "task choice" and kept["key"]["task"]["limit"] == 6:
            file.write_text(json.dumps(kept | {"value": {"value": {"task choice": [{"task": "choice"}]}}}))
    assert run(limit=6, quantised=False).cells == first.cells
    assert len(scored(run.said)) == 2


def test_scores_are_written_read_and_in_the_table(run, tmp_path):
    found = run(output=tmp_path / "out")
    assert Comparison.load(tmp_path / "out") == found
    assert found.meta["tasks"]["choice"]["limit"] == 10
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, cell in zip(rows, found.cells, strict=True):
        one = cell.scored("choice", "acc")
        assert float(row["choice/acc"]) == one.value
        assert float(row["choice/acc_stderr"]) == one.stderr
        assert float(row["choice/acc_difference"]) == one.difference
        ends = (row["choice/acc_difference_low"], row["choice/acc_difference_high"])
        assert tuple(map(float, ends)) == one.difference_interval
        assert row["choice/acc_documents"] == "10"


def test_a_folder_with_scores_keeps_them(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(tasks=None, tasks_dir=None, limit=None, quantised=False, output=out)
    run(quantised=False, output=out)
    found = run(quantised=False, tasks=["choice", "again"], output=out)
    assert all(len(cell.tasks) == 4 for cell in found.cells)
    monkeypatch.setattr(session, "load_model", None)
    with pytest.raises(ConfigError, match=r"scores on task again, which is not asked for now.*overwrite=True\.$"):
        run(quantised=False, output=out)
    with pytest.raises(ConfigError, match=r"scores on task choice with other limit \(10, not 9\)"):
        run(quantised=False, tasks=["choice", "again"], limit=9, output=out)
    assert Comparison.load(out) == found


def test_the_terminal_shows_them(run, capsys):
    from rich.console import Console

    found = run()
    print_comparison(Console(width=150, highlight=False), found)
    shown = capsys.readouterr().out
    table = shown[shown.index("choice, acc: the first 10 documents") :].splitlines()
    assert table[1].split() == ["acc", "standard", "error", "difference", "95%", "interval"]
    for line, cell in zip(table[2:6], found.cells, strict=True):
        one = cell.scored("choice", "acc")
        assert line.startswith(f"{cell.label} ")
        assert line.removeprefix(cell.label).split()[:2] == [f"{one.value:.4f}", f"{one.stderr:.4f}"]
        assert cell.kind == "dense" or f" {one.difference:+.4f} " in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "chioce"}, r"task 'chioce' is not found.* Did you mean 'choice'"),
        ({"tasks": ""}, "give names of tasks"),
        ({"tasks_dir": "nowhere"}, "folder of tasks nowhere does not exist"),
        ({"limit": 0}, "limit is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"tasks": None, "tasks_dir": None}, "limit belongs to tasks, which are not given"),
    ],
)
def test_mistakes_are_said_before_anything_loads(run, monkeypatch, tmp_path, change, message):
    from lm_eval.tasks import manager

    # To read the thousands of tasks that lm-eval ships takes seconds, and none of them matters here.
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "shipped" / "manager.py"))
    monkeypatch.setattr(session, "load_model", None)
    monkeypatch.setattr(session, "load_tokenizer", None)
    with pytest.raises(ConfigError, match=message):
        run(**change)


def test_without_lm_eval_the_remedy_is_said_before_anything_loads(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "countdown.integrations.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.setattr(session, "load_model", None)
    with pytest.raises(ConfigError, match=r"tasks need lm-eval.*pip install 'countdown-llm\[eval\]'"):
        run()
