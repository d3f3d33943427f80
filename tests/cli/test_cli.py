"""The command line as its users meet it: output, exit codes, and what a mistake looks like."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import countdown
from countdown.cli import main
from countdown.methods import METHODS
from countdown.selectors import SELECTORS

EVALUATE = ["--tokens", "1024", "--windows", "2"]


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, cwd: Path) -> Result:
    """Run the command line in this process: importing transformers anew for every test takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["countdown", *map(str, arguments)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def _environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a user's shell: without what conftest sets to quieten this process."""
    return {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"} | (more or {})


def spawn(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None, **more: Any) -> Result:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-P", "-m", "countdown", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=_environment(env), check=False, **more)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory):
    """A folder with a profile `p`, made through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    result = run(
        *("calibrate", model_folder, "-o", "p", "--method", "m-countdown", "--weighting", "rms"),
        *("--sparsity", "0.6", "--tokens", "1024"),
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "p\n"
    (folder / "wrong.yaml").write_text("- method: cats\n  sparsty: 0.5\n")
    (folder / "two.yaml").write_text("- method: d-proxy\n- method: cats\n  pattern: nothing\n")
    (folder / "budget.yaml").write_text("entries:\n- method: d-proxy\n- method: wina\n  sparsity: 0.3\n")
    (folder / "both.yaml").write_text("entries:\n- method: d-proxy\n- method: teal\n  pattern: '*.gate_proj'\n")
    (folder / "layers.yaml").write_text("entries:\n- method: d-proxy\n- {method: wina, pattern: '*.9.self_attn.*'}\n")
    (folder / "half.yaml").write_text("- method: r-sparse\n  pattern: '*.self_attn.*'\n")
    (folder / "short.txt").write_text("A text. " * 100)
    (folder / "recorded.search.json").write_text("[]")
    (folder / "nowhere.json").write_text('[{"method": "cats", "pattern": "blocks.*"}]')
    return folder


def test_inspect(model_folder, tmp_path):
    result = run("inspect", model_folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "LlamaForCausalLM: 3 gated FFNs (LlamaMLP), d 24, h 53, silu" in result.stdout
    assert "m-countdown" in result.stdout
    result = run("inspect", model_folder, "--json", "-", cwd=tmp_path)
    facts = json.loads(result.stdout)
    assert [ffn["name"] for ffn in facts["ffns"]] == [f"model.layers.{i}.mlp" for i in range(3)]
    read = {row["method"]: row["weights_read"] for row in facts["ceilings"] if row["sparsity"] == 0.5}
    assert {"chess", "d-proxy+wina", "teal"} <= set(read)
    # FFNs and attention's linears, each at half, and the proxies of the FFNs.
    ffn, attention = 3 * 24 * 53, 2 * 24 * 24 + 2 * 24 * 12
    assert read["d-proxy+wina"] == pytest.approx((read["d-proxy"] * ffn + 0.5 * attention) / (ffn + attention))


def test_calibrate_then_evaluate(made, model_folder):
    result = run("evaluate", model_folder, "--profile", "p", *EVALUATE, "--json", "-", "-q", cwd=made)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    (record,) = document["records"]
    assert (record["method"], record["weighting"], record["sparsity"]) == ("m-countdown", "rms", 0.6)
    assert record["tokens"] == 2 * 511
    assert 0.5 < record["realised_sparsity"] < 0.7
    assert set(document["meta"]) == {"date", "command", "hardware", "versions", "text", "calibration"}
    assert len(record["realised_sparsity_by_layer"]) == 3
    for part in ("recall", "precision", "lost"):
        assert len(record[f"{part}_by_module"]) == 3
        assert all(0 < share < 1 for share in record[f"{part}_by_module"])


def test_a_proxy_from_calibration_to_generation(model_folder, tmp_path):
    options = ["--method", "d-proxy", "--bits", "3", "--sparsity", "0.5", "--tokens", "1024", "-o", "p"]
    calibrated = run("calibrate", model_folder, *options, "--include-derived", cwd=tmp_path)
    assert calibrated.returncode == 0
    assert "when it runs, derived weights take 0.0 MB beside the model's" in calibrated.stderr
    assert (tmp_path / "p" / "derived.safetensors").is_file()
    assert run("export", model_folder, "--profile", "p", "-o", "m", "--include-derived", cwd=tmp_path).returncode == 0
    assert (tmp_path / "m" / "countdown" / "derived.safetensors").is_file()
    result = run("evaluate", model_folder, "--profile", "p", *EVALUATE, "--json", "-", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (record,) = json.loads(result.stdout)["records"]
    assert (record["method"], record["bits"]) == ("d-proxy", 3)
    row = 3 * 32 / 8 + 2  # 24 weights in one group of 32
    assert record["weights_read"] == pytest.approx(1 - record["realised_sparsity"] + 2 / 3 * row / (24 * 4))
    result = run("generate", model_folder, "hello", "--profile", "p", "--max-new-tokens", "4", "--raw", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "MB beside the weights" in result.stderr
    result = run("evaluate", model_folder, "--profile", "p", "--bits", "4", *EVALUATE, cwd=tmp_path)
    assert result.returncode == 2
    assert "bits is part of a profile's calibration" in result.stderr


def test_a_second_look_from_calibration_to_generation(model_folder, tmp_path):
    options = ["--method", "cats", "--second-look", "0.15", "--sparsity", "0.7", "--tokens", "2048"]
    calibrated = run("calibrate", model_folder, *options, "-o", "p", cwd=tmp_path)
    assert calibrated.returncode == 0, calibrated.stderr
    assert "profile of cats, second look, threshold at 0.7 written" in calibrated.stderr
    result = run("evaluate", model_folder, "--profile", "p", *EVALUATE, "--json", "-", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (record,) = json.loads(result.stdout)["records"]
    assert record["second_look"] == 0.15
    assert record["weights_read"] == pytest.approx((1 + 2 * (1 - record["realised_sparsity"])) / 3, abs=0.001)
    result = run("generate", model_folder, "hello", "--profile", "p", "--max-new-tokens", "4", "--raw", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run("evaluate", model_folder, "--profile", "p", "--decision", "topk", *EVALUATE, cwd=tmp_path)
    assert result.returncode == 2
    assert "decision 'topk' of cats does not go with a second look" in result.stderr


def test_compensation_from_calibration_to_generation(model_folder, tmp_path):
    read = {}
    for compensate in ("affine", "none"):
        options = ["--method", "m-countdown", "--compensate", compensate, "--sparsity", "0.7", "--tokens", "1024"]
        calibrated = run("calibrate", model_folder, *options, "-o", compensate, cwd=tmp_path)
        assert calibrated.returncode == 0, calibrated.stderr
        label = "m-countdown + affine" if compensate == "affine" else "m-countdown"
        assert f"profile of {label}, threshold at 0.7 written" in calibrated.stderr
        how = ["--profile", compensate]
        result = run("evaluate", model_folder, *how, *EVALUATE, "--json", "-", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        (record,) = json.loads(result.stdout)["records"]
        assert record["compensate"] == compensate
        read[compensate] = record["weights_read"]
        result = run("generate", model_folder, "hello", *how, "--max-new-tokens", "4", "--raw", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert read["affine"] > read["none"]
    result = run("evaluate", model_folder, "--profile", "affine", "--decision", "topk", *EVALUATE, cwd=tmp_path)
    assert result.returncode == 2
    assert "decision is part of a profile's calibration" in result.stderr


def test_sparsity_and_decision_change_at_load(made, model_folder):
    more = ["--sparsity", "0.25", "--decision", "topk", "--json", "r.json"]
    result = run("evaluate", model_folder, "--profile", "p", *EVALUATE, *more, cwd=made)
    assert result.returncode == 0, result.stderr
    assert "m-countdown × rms, topk at 0.25" in result.stdout
    (record,) = json.loads((made / "r.json").read_text())["records"]
    assert record["realised_sparsity"] == pytest.approx(13 / 53)


def test_evaluate_calibrates_a_method_on_the_spot(model_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("some text of mine. " * 100)
    result = run(
        "evaluate", model_folder, "--method", "chess", "--text", "mine.txt", *EVALUATE, "--protocol", "decode",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "cats × rms, threshold at 0.5" in result.stdout
    assert "510 scored tokens of mine.txt, dense prompts" in result.stdout


def test_a_set_chosen_from_the_prompt_from_calibration_to_generation(model_folder, tmp_path):
    calibrated = run("calibrate", model_folder, "--method", "griffin", "--tokens", "1", "-o", "p", cwd=tmp_path)
    assert calibrated.returncode == 0, calibrated.stderr
    evaluate = ("evaluate", model_folder, "--profile", "p", "--windows", "2", "--window", "64")
    result = run(*evaluate, "--prompt-tokens", "40", "--json", "-", "-q", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (record,) = json.loads(result.stdout)["records"]
    assert (record["method"], record["indicator"], record["prompt_tokens"]) == ("griffin", "given", 40)
    assert (record["tokens"], record["apply_to"]) == (2 * 23, "all")
    assert "every scored token sparse" in run(*evaluate, "--prompt-tokens", "40", cwd=tmp_path).stdout
    for options, message in (
        ((), "griffin does not fit apply_to='all'"),
        (("--prompt-tokens", "63"), "prompt_tokens is 63, expected 1 to 62"),
        (("--protocol", "all"), "say how many tokens are prompt"),
    ):
        refused = run(*evaluate, *options, cwd=tmp_path)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert message in refused.stderr
    generated = run("generate", model_folder, "Hello", "--profile", "p", "--max-new-tokens", "4", cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    for command in (
        ("evaluate", model_folder, "--method", "griffin"),
        ("generate", model_folder, "H", "--profile", "p"),
    ):
        refused = run(*command, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
    assert "griffin without a prompt" in refused.stderr


def test_sparse_linears_are_compared_with_their_exact_sets(model_folder, tmp_path):
    result = run("evaluate", model_folder, "--method", "teal", *EVALUATE, "--json", "e.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (record,) = json.loads((tmp_path / "e.json").read_text())["records"]
    assert record["method"] == "teal"
    assert len(record["recall_by_module"]) == 21
    assert all(0.5 < share <= 1 for share in record["recall_by_module"])


def test_generate(on_reference, made, model_folder):
    dense = run("generate", model_folder, "hello", "--max-new-tokens", "8", "--raw", cwd=made)
    assert dense.returncode == 0, dense.stderr
    both = run(
        "generate", model_folder, "hello", "--profile", "p", "--compare", "--max-new-tokens", "8", "--raw",
        "--json", "g.json", cwd=made,
    )  # fmt: skip
    assert both.returncode == 0, both.stderr
    first, second = json.loads((made / "g.json").read_text())["records"]
    assert (first["run"], second["run"]) == ("dense", "sparse")
    assert dense.stdout == first["text"] + "\n"
    assert both.stdout == "dense\n" + first["text"] + "\nsparse\n" + second["text"] + "\n"
    assert (second["method"], second["apply_to"]) == ("m-countdown", "decode")
    assert "tokens/s" in both.stderr
    assert "backend reference" in both.stderr


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


@pytest.fixture(scope="module")
def local_task(made):
    """A task in the folder `tasks`, whose documents are in the folder where the command line runs."""
    documents = [{"goal": f"count to {n}", "sol1": "one", "sol2": "two, three", "label": n % 2} for n in range(5)]
    (made / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (made / "tasks").mkdir()
    (made / "tasks" / "choice.yaml").write_text(TASK)


@pytest.mark.usefixtures("local_task")
def test_evaluate_on_a_local_task(made, model_folder):
    options = ["--tasks", "choice", "--tasks-dir", "tasks", "--limit", "4", "--json", "t.json"]
    result = run("evaluate", model_folder, "--profile", "p", *options, cwd=made)
    assert result.returncode == 0, result.stderr
    # Tests beside this one may take cores, which is said.
    said = [line for line in result.stderr.splitlines() if not line.startswith("warning: other processes kept")]
    assert said == ["scoring choice, dense and sparse"]
    document = json.loads((made / "t.json").read_text())
    (record,) = document["records"]
    assert (record["task"], record["metric"], record["documents"], record["limit"]) == ("choice", "acc", 4, 4)
    assert (record["method"], record["apply_to"]) == ("m-countdown", "all")
    assert document["meta"]["lm_eval"]
    assert [line.split()[:3] for line in result.stdout.splitlines()[1:2]] == [["choice", "acc", "4"]]
    assert f"every token sparse: {record['tokens']} tokens" in result.stdout


def test_evaluate_on_prompts(made, model_folder):
    (made / "prompts.jsonl").write_text('{"prompt": "hello there"}\n{"prompt": "go [on] and on"}\n{"prompt": "why"}\n')
    options = ["--prompts", "prompts.jsonl", "--max-new-tokens", "6", "--json", "c.json", "-q"]
    result = run("evaluate", model_folder, "--profile", "p", *options, cwd=made)
    assert result.returncode == 0, result.stderr
    means, *each = json.loads((made / "c.json").read_text())["records"]
    assert (means["prompts"], means["max_new_tokens"], means["apply_to"]) == (3, 6, "decode")
    assert [record["prompt"] for record in each] == ["hello there", "go [on] and on", "why"]
    assert result.stdout.splitlines()[2].startswith("go [on] and on ")
    assert "m-countdown × rms, threshold at 0.6\n" in result.stdout


RECIPE = """
- method: m-countdown
  weighting: rms
  sparsity: 0.6
- method: teal
  pattern: "*.self_attn.*"
  sparsity: 0.25
"""


def test_a_recipe_is_a_method_by_another_name(model_folder, tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    made = run("calibrate", model_folder, "--method", "mine.yaml", "--tokens", "1024", cwd=tmp_path)
    assert made.stdout == "tiny-llama-mine\n", made.stderr
    more = [*EVALUATE, "--json", "r.json"]
    result = run("evaluate", model_folder, "--profile", "tiny-llama-mine", *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "*: m-countdown × rms, threshold at 0.6\n*.self_attn.*: teal, threshold at 0.25\n" in result.stdout
    (record,) = json.loads((tmp_path / "r.json").read_text())["records"]
    assert [entry["name"] for entry in record["recipe"]] == ["m-countdown", "teal"]
    assert len(record["realised_sparsity_by_layer"]) == 3 + 3 * 4
    again = run("evaluate", model_folder, "--method", "mine.yaml", "--sparsity", "0.1", *EVALUATE, cwd=tmp_path)
    assert "m-countdown × rms, threshold at 0.1\n*.self_attn.*: teal, threshold at 0.1\n" in again.stdout


def test_a_search_writes_a_recipe_and_its_profile(model_folder, tmp_path):
    search = ["--method", "r-sparse", "--search", "--population", "4", "--generations", "2", "--tokens", "1024"]
    made = run("calibrate", model_folder, *search, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout == "tiny-llama-r-sparse\n"
    assert "8 of 8 candidates, generation 2: best perplexity" in made.stderr
    assert "on other samples" in made.stderr
    record = json.loads((tmp_path / "tiny-llama-r-sparse.search.json").read_text())
    assert len(record["perplexities"]) == 8
    again = run("calibrate", model_folder, "--method", "tiny-llama-r-sparse.yaml", "-o", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    first, second = (json.loads((tmp_path / name / "profile.json").read_text()) for name in (made.stdout[:-1], "again"))
    assert first["entries"][0]["method"] == second["entries"][0]["method"]
    taken = run("calibrate", model_folder, *search, cwd=tmp_path)
    assert taken.returncode == 2
    assert "tiny-llama-r-sparse exists already" in taken.stderr


def test_without_a_method_one_is_picked_and_the_reason_said(model_folder, tmp_path):
    made = run("calibrate", model_folder, "-o", "p", "--sparsity", "0.6", "--tokens", "1536", "-q", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout == "p\n"
    picked, instead, *_ = made.stderr.splitlines()
    assert picked.startswith("picked ")
    assert "threshold at 0.6: KL 0." in picked
    assert instead.startswith("instead of ")
    assert instead.count(": KL ") == 4  # of them one with attention, and one with a prediction
    (entry,) = json.loads((tmp_path / "p" / "profile.json").read_text())["entries"]
    assert entry["method"]["name"] in picked
    assert entry["method"]["sparsity"] == 0.6


def test_global_allocation_gives_each_module_its_own_target(model_folder, tmp_path):
    settings = ["--method", "m-countdown", "--weighting", "rms", "--sparsity", "0.7", "--allocation", "global"]
    made = run("calibrate", model_folder, "-o", "p", *settings, "--tokens", "4096", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    result = run("evaluate", model_folder, "--profile", "p", *EVALUATE, "--json", "-", cwd=tmp_path)
    (record,) = json.loads(result.stdout)["records"]
    assert record["allocation"] == "global"
    assert record["realised_sparsity"] == pytest.approx(0.7, abs=0.03)
    assert max(record["realised_sparsity_by_layer"]) - min(record["realised_sparsity_by_layer"]) > 0.1


def test_one_budget_from_a_recipe_file_to_the_status(model_folder, tmp_path):
    (tmp_path / "r.yaml").write_text("sparsity: 0.4\nentries: [{method: d-proxy}, {method: wina}]")
    made = run("calibrate", model_folder, "-o", "p", "--method", "r.yaml", "--tokens", "2048", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "one budget, global, at 0.4" in made.stderr
    result = run("evaluate", model_folder, "--profile", "p", *EVALUATE, "--json", "-", cwd=tmp_path)
    (record,) = json.loads(result.stdout)["records"]
    assert (record["method"], record["allocation"], record["sparsity"]) == ("recipe", "global", 0.4)
    assert len(record["realised_sparsity_by_layer"]) == 3 + 3 * 4
    shown = run("evaluate", model_folder, "--profile", "p", "--sparsity", "0.2", *EVALUATE, cwd=tmp_path)
    assert "one budget, global, at 0.2" in shown.stdout


def test_an_exported_folder_runs_sparse_by_its_name_alone(made, model_folder, tmp_path):
    profile = made / "p"
    written = run("export", model_folder, "--profile", profile, "-o", "mine", cwd=tmp_path)
    assert written.stdout == "mine\n", written.stderr
    alone = run("generate", "mine", "hello", "--max-new-tokens", "8", "--raw", cwd=tmp_path)
    assert "using the profile in mine" in alone.stderr
    assert "realised sparsity" in alone.stderr
    given = run("generate", model_folder, "hello", "--profile", profile, "--max-new-tokens", "8", "--raw", cwd=tmp_path)
    assert alone.stdout == given.stdout != "\n"
    result = run("evaluate", "mine", *EVALUATE, cwd=tmp_path)
    assert "m-countdown × rms, threshold at 0.6" in result.stdout


def test_several_texts_share_the_tokens(model_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("some text of mine. " * 100)
    texts = ["--text", "python-docs", "--text", "mine.txt"]
    made = run("calibrate", model_folder, "-o", "p", "--method", "cats", *texts, "--tokens", "2048", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    calibration = json.loads((tmp_path / "p" / "profile.json").read_text())["calibration"]
    assert [seen["source"] for seen in calibration["texts"]] == ["python-docs", "mine.txt"]
    assert calibration["tokens"] == 2048
    seen = run("evaluate", model_folder, "--profile", "p", "--text", "mine.txt", cwd=tmp_path)
    assert seen.returncode == 2
    assert "calibrated on this very text (mine.txt)" in seen.stderr


def test_generate_keeps_stdout_for_json(made, model_folder):
    result = run("generate", model_folder, "hello", "--max-new-tokens", "4", "--raw", "--json", "-", cwd=made)
    (record,) = json.loads(result.stdout)["records"]
    assert record["text"] in result.stderr


def test_evaluating_on_the_calibration_text_is_refused(model_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("some text of mine. " * 100)
    common = ["--text", "mine.txt"]
    made = run("calibrate", model_folder, "-o", "p", "--method", "cats", *common, "--tokens", "1024", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    result = run("evaluate", model_folder, "--profile", "p", *common, "--windows", "1", cwd=tmp_path)
    assert result.returncode == 2
    assert "calibrated on this very text" in result.stderr


def test_ctrl_c_while_calibrating_leaves_nothing(model_folder, tmp_path):
    command = [sys.executable, "-m", "countdown", "calibrate", model_folder, "-o", "p", "--method", "cats"]
    command += ["--tokens", "65536"]
    # What runs the tests may ignore it, as a shell's background jobs do.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, **heard) as process:
        for line in process.stderr:
            if line.startswith("calibrating"):
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_from_stdin(model_folder, tmp_path, monkeypatch):
    spoken = run("generate", model_folder, "hello", "--max-new-tokens", "4", "--raw", cwd=tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    read = run("generate", model_folder, "-", "--max-new-tokens", "4", "--raw", cwd=tmp_path)
    assert read.stdout == spoken.stdout != "\n"


MISTAKES = {
    "no such model": (["inspect", "./nope"], "./nope does not exist"),
    "method": (["calibrate", "{model}", "--method", "m-countdwn"], "Did you mean 'm-countdown'"),
    "sparsity": (["calibrate", "{model}", "--sparsity", "70"], "0.7 skips 70%"),
    "decision": (["calibrate", "{model}", "--method", "d-countdown", "--decision", "top-k"], "Did you mean 'topk'"),
    "bits": (["calibrate", "{model}", "--method", "d-proxy", "--bits", "2"], "bits of d-proxy is 2, expected 3 or 4"),
    "bits of another": (
        ["calibrate", "{model}", "--method", "cats", "--bits", "4"],
        "method 'cats' has no field 'bits'",
    ),
    "compensation": (
        ["calibrate", "{model}", "--method", "cats", "--compensate", "linear"],
        "compensate of cats is 'linear', expected one of: none, affine",
    ),
    "a second look of a method that has none": (
        ["calibrate", "{model}", "--method", "d-proxy", "--second-look", "0.15"],
        "method 'd-proxy' has no field 'second_look'",
    ),
    "too wide a second look": (
        ["calibrate", "{model}", "--method", "cats", "--second-look", "1.15"],
        "second_look of cats is 1.15, expected 0 to 0.5 (0.15 is usual, 0 for none)",
    ),
    "a second look at topk": (
        ["calibrate", "{model}", "--method", "cats", "--second-look", "0.15", "--decision", "topk"],
        "decision 'topk' of cats does not go with a second look, which compares with a threshold: take second_look 0",
    ),
    "compensation of linears": (
        ["calibrate", "{model}", "--method", "teal", "--compensate", "affine"],
        "method 'teal' has no field 'compensate'",
    ),
    "nothing to compensate with": (
        ["evaluate", "{model}", "--profile", "p", "--compensate", "affine"],
        "compensate is part of a profile's calibration; calibrate again to change it",
    ),
    "bits in a recipe": (["calibrate", "{model}", "--method", "two.yaml", "--bits", "4"], "has no field 'bits'"),
    "no shape": (["benchmark", "ffn", "--shape", "4096"], "expected two sizes, d and h"),
    "two subjects": (["benchmark", "decode", "{model}", "--shape", "llama-3.1-8b"], "give a model, or --shape"),
    "text": (["calibrate", "{model}", "--text", "wikitex2"], "Did you mean 'wikitext2'"),
    "text dir": (
        ["calibrate", "{model}", "--text", "python-docs", "--text", "wrong.yaml", "--text-dir", "."],
        "belongs to",
    ),
    "tokens": (["calibrate", "{model}", "-o", "new", "--tokens", "100"], "at least one window"),
    "output taken": (["calibrate", "{model}", "-o", "p"], "p exists already; give another path or --overwrite."),
    "no profile": (["evaluate", "{model}"], "give --profile DIR"),
    "both": (["evaluate", "{model}", "--profile", "p", "--method", "cats"], "not both"),
    "not a profile": (["evaluate", "{model}", "--profile", "."], "is not a profile"),
    "weighting": (["evaluate", "{model}", "--profile", "p", "--weighting", "none"], "calibrate again"),
    "too many windows": (["evaluate", "{model}", "--profile", "p", "--windows", "100000"], "too few for"),
    "compare with nothing": (["generate", "{model}", "hi", "--compare"], "something to compare"),
    "empty prompt": (["generate", "{model}", " "], "prompt is empty"),
    "dtype": (["generate", "{model}", "hi", "--dtype", "int4"], "dtype is 'int4'"),
    "ignored": (["generate", "{model}", "hi", "--sparsity", "0.7"], "--sparsity needs --profile or --method"),
    "recipe": (["calibrate", "{model}", "--method", "wrong.yaml"], "Did you mean 'sparsity'"),
    "no such recipe": (["calibrate", "{model}", "--method", "nope.yaml"], "recipe nope.yaml cannot be read"),
    "pattern": (["calibrate", "{model}", "--method", "nowhere.json"], "takes no module of the model"),
    "budget": (["calibrate", "{model}", "--method", "budget.yaml"], "entry 2 of budget.yaml has sparsity of its own"),
    "one linear": (
        ["calibrate", "{model}", "--method", "both.yaml"],
        "'*.gate_proj' takes no module of the model: earlier",
    ),
    "layers": (["calibrate", "{model}", "--method", "layers.yaml"], "'*.9.self_attn.*' takes no module of the model"),
    "greedy": (["calibrate", "{model}", "--method", "cats", "--allocation", "greedy"], "expected one of: global, unif"),
    "allocation": (["calibrate", "{model}", "--method", "cats", "--allocation", "globl"], "Did you mean 'global'"),
    "picked": (["calibrate", "{model}", "--bits", "4"], "--bits is picked by --method auto"),
    "too little to pick by": (["calibrate", "{model}", "-o", "new", "--tokens", "1024"], "takes 3 sequences of text"),
    "two wishes": (["calibrate", "{model}", "--sparsity", "0.5", "--max-loss", "0.1"], "one follows from the other"),
    "nothing derived": (
        ["calibrate", "{model}", "--method", "cats", "--include-derived"],
        "--include-derived stores proxies (d-proxy) and low ranks (r-sparse, α below 1); cats has none",
    ),
    "nothing to export": (
        ["export", "{model}", "--profile", "p", "-o", "new", "--include-derived"],
        "no method of this profile derives weights that could be stored",
    ),
    "no loss": (["calibrate", "{model}", "--max-loss", "0"], "expected more than 0"),
    "loss of a method": (["calibrate", "{model}", "--method", "cats", "--max-loss", "0.1"], "belongs to --method auto"),
    "auto elsewhere": (["evaluate", "{model}", "--method", "auto"], "--method auto belongs to countdown calibrate"),
    "not allocated": (["evaluate", "{model}", "--profile", "p", "--allocation", "global"], "calibrate again with it"),
    "export taken": (["export", "{model}", "--profile", "p", "-o", "p"], "p exists already"),
    "export nothing": (["export", "{model}", "--profile", "nope", "-o", "new"], "nope is not a profile"),
    "revision": (["inspect", "{model}", "--revision", "main"], "belongs to models on the hub"),
    "context": (["generate", "{model}", "hi", "--max-new-tokens", "5000"], "longer than the model's context"),
    "no such folder": (["calibrate", "{model}", "-o", "p/profile.json/q"], "not a folder that you may write to"),
    "apply to": (["generate", "{model}", "hi", "--profile", "p", "--apply-to", "most"], "--apply-to is 'most'"),
}
SEARCHED = ["calibrate", "{model}", "-o", "new", "--search"]
MISTAKES |= {
    "search of auto": (SEARCHED, "--search is for α of r-sparse; give --method r-sparse"),
    "search of another": ([*SEARCHED, "--method", "teal"], "--search is for α of r-sparse; give --method r-sparse"),
    "search of a part": ([*SEARCHED, "--method", "half.yaml"], "--search is for α of r-sparse; give --method r-sparse"),
    "search and alpha": ([*SEARCHED, "--method", "r-sparse", "--alpha", "0.9"], "leave out the one that is given"),
    "small search": (
        [*SEARCHED, "--method", "r-sparse", "--population", "3"],
        "population of the search is 3, expected",
    ),
    "no search": (["calibrate", "{model}", "--method", "r-sparse", "--generations", "9"], "--generations belongs to"),
    "alpha": (["calibrate", "{model}", "--method", "r-sparse", "--alpha", "1.2"], "expected 0 ≤ alpha ≤ 1"),
    "alpha of another": (["calibrate", "{model}", "--method", "teal", "--alpha", "1"], "'teal' has no field 'alpha'"),
    "search short of text": (
        [*SEARCHED, "--method", "r-sparse", "--text", "short.txt", "--tokens", "512"],
        "too few for",
    ),
    "another's record": ([*SEARCHED, "--method", "r-sparse", "-o", "recorded"], "is no record of a search; remove it"),
}
EVALUATED = ["evaluate", "{model}", "--profile", "p"]
MISTAKES |= {
    "two subjects to evaluate": ([*EVALUATED, "--tasks", "piqa", "--prompts", "x"], "--tasks or --prompts, not both"),
    "text and tasks": ([*EVALUATED, "--tasks", "x", "--windows", "2"], "--windows does not go with --tasks"),
    "tasks that are not": ([*EVALUATED, "--limit", "3"], "--limit belongs to --tasks, which is not given"),
    "no prompts": ([*EVALUATED, "--max-new-tokens", "8"], "--max-new-tokens belongs to --prompts"),
    "no such task": ([*EVALUATED, "--tasks", "piqua"], "task 'piqua' is not found. Did you mean 'piqa'"),
    "no such file of prompts": ([*EVALUATED, "--prompts", "nope.txt"], "file of prompts nope.txt cannot be read"),
    "protocol": ([*EVALUATED, "--protocol", "some"], "--protocol is 'some'"),
    "dense by protocol": ([*EVALUATED, "--tasks", "tasks/choice.yaml", "--protocol", "decode"], "'all' fits"),
}
MISTAKES["no clock"] = (["benchmark", "ffn", "--device", "meta"], "benchmarks run on cuda and cpu")


if not torch.cuda.is_available():
    MISTAKES["no gpu"] = (["benchmark", "ffn", "--device", "cuda"], "device 'cuda' cannot be used")


@pytest.mark.usefixtures("local_task")
@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, made, model_folder):
    before = sorted(made.rglob("*"))
    result = run(*(a.replace("{model}", str(model_folder)) for a in arguments), "-q", cwd=made)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert sorted(made.rglob("*")) == before


@pytest.mark.parametrize("missing", [["profile.json", "profile.safetensors"], ["profile.safetensors"]])
def test_the_command_that_is_suggested_makes_the_profile_that_was_asked_for(missing, made, model_folder, tmp_path):
    model, profile = tmp_path / "my model", tmp_path / "my profile"
    shutil.copytree(model_folder, model)
    if "profile.json" not in missing:
        shutil.copytree(made / "p", profile)
    for name in missing:
        (profile / name).unlink(missing_ok=True)
    generate = ["generate", "my model", "hi", "--max-new-tokens", "2", "--profile", "my profile"]
    refused = run(*generate, cwd=tmp_path)
    assert refused.returncode == 2
    _, *suggested = shlex.split(refused.stderr[refused.stderr.index("countdown calibrate") :])
    made = run(*suggested, "--method", "cats", "--tokens", "512", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert run(*generate, cwd=tmp_path).returncode == 0


def test_mistakes_that_the_parser_finds(tmp_path):
    result = run("evaluate", cwd=tmp_path)
    assert result.returncode == 2
    assert "Missing argument" in result.stderr
    assert run("evalaute", cwd=tmp_path).returncode == 2


def test_debug_shows_the_traceback(tmp_path):
    result = spawn("inspect", "./nope", "--debug", cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_progress_is_plain_lines_outside_a_terminal(model_folder, tmp_path):
    mine = ["--method", "m-countdown", "--tokens", "1024"]
    result = spawn("calibrate", model_folder, "-o", "q", *mine, cwd=tmp_path)
    assert result.stdout == "q\n"
    assert "calibrating (1 of 1), thresholds of m-countdown: done\n" in result.stderr
    assert "\r" not in result.stderr
    assert "\x1b" not in result.stderr
    quiet = run("calibrate", model_folder, "-o", "r", *mine, "-q", cwd=tmp_path)
    assert "calibrating" not in quiet.stderr


PLUGIN = '''
from dataclasses import dataclass
from countdown.methods import Method
from countdown.selectors import Factor

@dataclass(frozen=True, kw_only=True)
class Sum(Method):
    """Keep the neurons with large |a| + |u|."""
    name = "sum-of-both"
    summary = "|act(g)| + |u|"
    source = "a test"
    selector = Factor("sum-of-both", reads=("gate", "up"), formula=lambda a, u: a.abs() + u.abs())
    unseen = None
'''


@pytest.fixture
def forgotten(monkeypatch):
    """Methods are found anew, and what a test adds is gone after it."""
    for registry in (METHODS, SELECTORS):
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_complete", False)
    return monkeypatch


def test_a_method_from_outside_the_package(model_folder, tmp_path, forgotten):
    (tmp_path / "my_methods.py").write_text(PLUGIN)
    info = tmp_path / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[countdown.methods]\nsum-of-both = my_methods:Sum\n")
    missing = run("calibrate", model_folder, "--method", "sum-of-both", "-o", "threshold", cwd=tmp_path)
    assert missing.returncode == 2
    assert "method is 'sum-of-both'" in missing.stderr
    forgotten.setattr(METHODS, "_complete", False)
    forgotten.syspath_prepend(tmp_path)
    for decision in ("threshold", "topk"):
        result = run(
            "calibrate", model_folder, "--method", "sum-of-both", "-o", decision, "--decision", decision,
            "--sparsity", "0.7", "--tokens", "1024", cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        result = run("evaluate", model_folder, "--profile", decision, *EVALUATE, "--json", "-", cwd=tmp_path)
        (record,) = json.loads(result.stdout)["records"]
        assert record["method"] == "sum-of-both"
        assert record["realised_sparsity"] == pytest.approx(0.7, abs=0.05)
        assert record["perplexity"] != record["dense_perplexity"]
    model = countdown.from_pretrained(str(model_folder), tmp_path / "threshold", device="cpu")
    assert countdown.status(model)[0].method == "sum-of-both"


def test_an_interrupted_comparison_says_that_it_goes_on(monkeypatch, tmp_path, capsys):
    from countdown.cli.compare import _stoppable

    with pytest.raises(KeyboardInterrupt), _stoppable():
        raise KeyboardInterrupt
    assert "the same command goes on from there" in capsys.readouterr().err
