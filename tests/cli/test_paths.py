"""Paths on the command line: checked before the work, `~`, and what is suggested to run next."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from cli.test_cli import run
from countdown import loading, sparsify
from countdown.cli.benchmark import _written
from countdown.cli.commands import app
from countdown.cli.inputs import check_file_free
from countdown.comparison import session
from countdown.errors import ConfigError

PROFILE = ("--method", "cats", "--sparsity", "0.5", "--tokens", "1024")


@pytest.fixture
def nothing_loads(monkeypatch):
    """What comes before the model loads comes before the work."""
    for module in (loading, sparsify, session):
        monkeypatch.setattr(module, "load_model", None)
    monkeypatch.setattr(loading, "load_skeleton", None)


COMMANDS = {
    "inspect": ("inspect", "{model}", "--json"),
    "evaluate": ("evaluate", "{model}", "--method", "cats", "--json"),
    "generate": ("generate", "{model}", "hi", "--json"),
    "benchmark bandwidth": ("benchmark", "bandwidth", "--json"),
    "benchmark ffn": ("benchmark", "ffn", "--json"),
    "benchmark decode": ("benchmark", "decode", "{model}", "--json"),
    "compare": ("compare", "{model}", "--json"),
    "compare -o": ("compare", "{model}", "-o"),
    "calibrate": ("calibrate", "{model}", "-o"),
    "export": ("export", "{model}", "--profile", "p", "-o"),
    "report": ("report", "c", "-o"),
    "demo": ("demo", "-o"),
}


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("where", ["/proc/x", "file/x", "circle"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_where_nothing_can_be_written_is_said_before_the_work(command, where, model_folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(tmp_path.iterdir())
    result = run(*(part.replace("{model}", str(model_folder)) for part in command), where, cwd=tmp_path)
    assert result.returncode == 2
    assert where in result.stderr
    assert "cannot be written" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("command", [c for c in COMMANDS.values() if "--json" in c], ids=" ".join)
def test_json_onto_a_folder_is_said_before_the_work(command, model_folder, tmp_path):
    result = run(*(part.replace("{model}", str(model_folder)) for part in command), ".", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, "error: --json: . is a folder; give the name of a file.\n")


@pytest.mark.usefixtures("nothing_loads")
def test_a_command_calls_an_option_by_its_own_name(model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.csv").touch()
    result = run("compare", model_folder, "-o", "out", cwd=tmp_path)
    told = "error: out/comparison.csv exists already; give another output or --overwrite.\n"
    assert (result.returncode, result.stderr) == (2, told)


@pytest.mark.usefixtures("nothing_loads")
def test_what_a_comparison_would_write_over_in_the_end_is_said_first(model_folder, tmp_path):
    (tmp_path / "out" / "comparison.csv").mkdir(parents=True)
    result = run("compare", model_folder, "-o", "out", "--overwrite", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (
        2,
        "error: out/comparison.csv is a folder; give the name of a file.\n",
    )


def test_numbers_go_through_a_pipe(model_folder, tmp_path):
    end, other = os.pipe()
    assert run("inspect", model_folder, "--json", f"/dev/fd/{other}", cwd=tmp_path).returncode == 0
    os.close(other)
    with open(end, encoding="utf-8") as file:
        assert json.load(file)["model_class"] == "LlamaForCausalLM"


def test_a_file_has_at_any_time_all_that_was_measured_and_a_pipe_gets_it_once(tmp_path):
    def measured(target: Path):
        yield {"n": 1}
        if target.parent == tmp_path:
            assert json.loads(target.read_text())["records"] == [{"n": 1}]
        yield {"n": 2}

    end, other = os.pipe()
    for target in (tmp_path / "r.json", Path(f"/dev/fd/{other}")):
        _written(str(target), {}, measured(target))
    os.close(other)
    with open(end, encoding="utf-8") as pipe:
        assert json.load(pipe) == json.loads((tmp_path / "r.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]


def test_numbers_to_stdout_by_its_other_name_have_it_alone(model_folder, tmp_path):
    result = run("inspect", model_folder, "--json", "/dev/stdout", cwd=tmp_path)
    assert json.loads(result.stdout)["model_class"] == "LlamaForCausalLM"
    assert "3 gated FFNs" in result.stderr


def test_a_pipe_needs_no_overwrite(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    check_file_free(tmp_path / "fifo", overwrite=False)
    with pytest.raises(ConfigError, match="exists already"):
        check_file_free(tmp_path / "file", overwrite=False)


def path_parameters() -> list[tuple[str, str, Any]]:
    """Every parameter of every command that is a path: (command, name, what typer is told of it)."""
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    found = []
    for command in (command.callback for group in groups for command in group.registered_commands):
        for name, hint in get_type_hints(command, include_extras=True).items():
            kind, *told = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if Path in (kind, *get_args(kind)):
                found.append((command.__name__, name, told[0]))
    return found


def test_every_path_has_a_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = path_parameters()
    options = {"output", "profile", "text_dir", "prompts", "tasks_dir", "union", "folder"}
    assert {name for _, name, _ in found} >= options
    for command, name, told in found:
        assert told.callback is not None, (command, name)
        assert told.callback(Path("~/x")) == Path("/home/me/x"), (command, name)


def test_a_tilde_is_home(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "r.yaml").write_text("- {method: cats, sparsity: 0.5}")
    made = run("calibrate", model_folder, "--method=~/r.yaml", "--tokens=1024", "--output=~/p", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{tmp_path}/home/p\n"
    written = run(
        "generate", model_folder, "hi", "--profile=~/p", "--max-new-tokens=2", "--raw", "--json=~/g.json", cwd=tmp_path
    )
    assert written.returncode == 0, written.stderr
    assert len(json.loads((tmp_path / "home" / "g.json").read_text())["records"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def what_to_run(done):
    """The rest of its line: a warning may follow, as that other processes take the cores."""
    return done.stderr.rpartition("; run: ")[2].splitlines()[0]


def test_what_to_run_next_can_be_pasted(model_folder, tmp_path):
    made = run("calibrate", model_folder, *PROFILE, "-o", "my 'own' profile", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    again = shlex.split(what_to_run(made))
    assert again == ["countdown", "generate", str(model_folder), "--profile", "my 'own' profile", "Hello"]
    written = run("export", model_folder, "--profile", "my 'own' profile", "-o", "the model", cwd=tmp_path)
    assert shlex.split(what_to_run(written)) == ["countdown", "generate", "the model", "Hello"]


def test_a_prompt_that_is_too_long_is_refused_before_the_work(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("countdown.calibration.calibrate.calibrate", None)
    (tmp_path / "prompts.txt").write_text("short\n\n" + "long " * 500 + "\n")
    what = ("--method", "cats", "--prompts", "prompts.txt", "--max-new-tokens", "8")
    result = run("evaluate", model_folder, *what, "-q", cwd=tmp_path)
    assert result.returncode == 2
    assert "prompt 2 of 2: the prompt has " in result.stderr
    assert "longer than the model's context" in result.stderr
    assert len(result.stderr.splitlines()) == 1
