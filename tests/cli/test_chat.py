"""`countdown chat` and `countdown serve` as their users call them."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import typer
from test_cli import made, run, spawn  # noqa: F401  (a fixture among them)

from serving import TEMPLATE
from tiny import byte_tokenizer


@pytest.fixture(scope="module")
def chat_folder(model_folder, tmp_path_factory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tiny-chat"
    shutil.copytree(model_folder, folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def said(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: Any, cwd: Path) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return run("chat", *arguments, cwd=cwd)


def test_a_chat_from_a_pipe(chat_folder, tmp_path, monkeypatch):
    lines = "hello\nwhy\n/system be brief\n/reset\nhello\n\n/nothing\n/sparsity 0.5\n/help\n/exit\nnever\n"
    result = said(monkeypatch, lines, chat_folder, "--max-new-tokens", "5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("(5 tokens") == 3
    assert re.search(r"\d+ of \d+ prompt tokens known", result.stderr)
    for expected in ("the system message is now: be brief", "forgotten", "there is no /nothing", "/sparsity X"):
        assert expected in result.stderr
    assert "the model is dense and has no profile" in result.stderr
    assert "never" not in result.stderr


def test_a_sparse_chat_changes_its_sparsity(chat_folder, made, monkeypatch):  # noqa: F811
    lines = "hello\n/sparsity 0.9\nhello\n/sparsity 2\n/sparsity much\nhello\n"
    result = said(monkeypatch, lines, chat_folder, "--profile", "p", "--max-new-tokens", "40", cwd=made)
    assert result.returncode == 0, result.stderr
    shares = [int(found) for found in re.findall(r"realised sparsity (\d+)%", result.stderr)]
    assert len(shares) == 3
    assert 45 <= shares[0] <= 75
    assert min(shares[1:]) > 80
    assert "/sparsity: sparsity of m-countdown is 2.0, expected 0" in result.stderr
    assert "'much' is no share such as 0.5" in result.stderr


def test_a_chat_draws_the_same_with_a_seed(chat_folder, tmp_path, monkeypatch):
    options = ["--temperature", "2", "--seed", "5", "-q", "--max-new-tokens", "12"]
    first, second = (said(monkeypatch, "hello\n", chat_folder, *options, cwd=tmp_path).stdout for _ in range(2))
    assert first == second
    assert first.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0, expected 0"),
        (["--top-p", "0"], "top_p is 0.0, expected above 0"),
        (["--context", "100000"], "context is 100000, expected 2 to the model's 2048"),
        (["--sparsity", "0.5"], "--sparsity needs --profile"),
        (["--top-p", "0.5"], "--top-p is for tokens that are drawn: give a --temperature above 0, too"),
    ],
)
def test_a_chat_that_cannot_be_is_refused(arguments, message, chat_folder, tmp_path, monkeypatch):
    result = said(monkeypatch, "hello\n", chat_folder, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_model_without_a_chat_template_cannot_chat(model_folder, tmp_path, monkeypatch):
    result = said(monkeypatch, "hello\n", model_folder, cwd=tmp_path)
    assert result.returncode == 2
    assert "no chat template" in result.stderr


def test_in_a_terminal_ctrl_c_ends_a_line_and_ctrl_d_the_chat(chat_folder, tmp_path):
    command = [sys.executable, "-P", "-m", "countdown", "chat", str(chat_folder), "--max-new-tokens", "9"]
    process, terminal = pty.fork()
    if process == 0:  # pragma: no cover
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which whoever runs tests may ignore
        os.chdir(tmp_path)
        os.execv(command[0], command)
    shown = b""

    def until(pattern: bytes, keys: bytes = b"", seconds: float = 40) -> None:
        """Press keys until a pattern is shown: a terminal forgets those that come while it changes its mode."""
        nonlocal shown
        end = time.monotonic() + seconds
        while not re.search(pattern, shown):
            assert time.monotonic() < end, shown
            os.write(terminal, keys)
            while select.select([terminal], [], [], 2)[0]:
                shown += os.read(terminal, 65536)
                if re.search(pattern, shown):
                    return

    until(rb"> $")
    # Between two prompts Ctrl-C does no harm; in an answer it ends that, which on this small model takes luck to meet.
    until(rb"> \S*\s+> $", b"\x03")
    until(rb"hello\r\n[\s\S]+tokens/s[\s\S]*> $", b"hello\n")
    until(rb"forgotten[\s\S]*> $", b"/reset\n")
    time.sleep(0.5)
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


@contextmanager
def serving(*arguments: Any, cwd: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`countdown serve` on a free port, and its address."""
    command = [sys.executable, "-P", "-m", "countdown", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"(http://\S+)/v1", line):
                break
        else:
            raise AssertionError("".join(lines))
        process.lines = lines  # type: ignore[attr-defined]
        yield found[1], process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_serve_answers_openais_client_and_ends_clean(chat_folder, made):  # noqa: F811
    arguments = [chat_folder, "--profile", "p", "--name", "mine", "--api-key", "k", "--sparse-up-to", "2"]
    with serving(*arguments, cwd=made) as (url, process):
        assert "sparse: m-countdown" in "".join(process.lines)
        assert "more than 2 answers at a time are dense" in "".join(process.lines)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        stream = client.chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "hello"}], max_tokens=300, stream=True, temperature=0
        )
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices[0].delta.role == "assistant"
        assert rest[-1].choices[0].finish_reason == "length"
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr.read() == ""


def test_serve_without_a_profile_is_dense_and_says_how_not_to_be(chat_folder, tmp_path):
    with serving(chat_folder, cwd=tmp_path) as (url, process):
        said_ = "".join(process.lines)
        assert f"countdown serve {chat_folder} --max-loss 2%" in said_
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        assert client.models.list().data[0].id == "tiny-chat"


def test_serve_says_that_a_port_is_taken(chat_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", chat_folder, "--port", taken.getsockname()[1], cwd=tmp_path)
    assert result.returncode == 2
    assert re.search(
        r"cannot listen on 127.0.0.1, port \d+: Address already in use. Give another --port", result.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid is no address of this machine"),
        (["--max-loss", "much"], "--max-loss is much, expected a share such as 2% or 0.02"),
        (["--max-loss", "200%"], "--max-loss is 200%, expected a share"),
        (["--max-loss", "2%", "--sparsity", "0.5"], "--max-loss finds the profile; leave out"),
        (["--context", "100000", "--port", "0"], "context is 100000, expected 2 to the model's 2048"),
        (["--sparsity", "0.5"], "--sparsity needs --profile"),
        (["--sparse-up-to", "9"], "less than or equal to 8"),
    ],
)
def test_a_server_that_cannot_be_is_refused(arguments, message, chat_folder, tmp_path):
    result = run("serve", chat_folder, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_max_loss_calibrates_once_and_keeps_the_profile(chat_folder, tmp_path, monkeypatch):
    from countdown.cli import serve

    monkeypatch.setenv("COUNTDOWN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(serve, "CALIBRATION_TOKENS", 2048)
    served = []
    monkeypatch.setattr(serve, "_run", lambda model, *_: served.append(model))
    # Of a random model hardly anything is lost.
    results = [run("serve", chat_folder, "--max-loss", "20%", "--port", "0", "-q", cwd=tmp_path) for _ in range(2)]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert "calibrating, once" in results[0].stderr
    assert "using the profile that was calibrated" in results[1].stderr
    assert "calibrating" not in results[1].stderr
    assert all(any("SparseModule" in type(m).__name__ for m in model.modules()) for model in served)


def test_ctrl_c_stops_an_answer_and_not_the_chat(chat_folder, tmp_path, monkeypatch):
    echo, pieces = typer.echo, []

    def interrupting(*args, **more):
        pieces.append(args)
        if len(pieces) == 3:
            raise KeyboardInterrupt
        echo(*args, **more)

    monkeypatch.setattr("countdown.cli.chat.typer.echo", interrupting)
    result = said(monkeypatch, "hello\nhello\n", chat_folder, "--max-new-tokens", "6", cwd=tmp_path)
    assert result.returncode == 0
    assert "(stopped)" in result.stderr
    assert result.stderr.count("(6 tokens") == 1


def test_generate_draws_where_it_is_told_to(model_folder, tmp_path):
    def text(*options: str) -> str:
        result = run("generate", model_folder, "hi", "--raw", "--max-new-tokens", "12", "-q", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return str(result.stdout)

    drawn = [text("--temperature", "3", "--top-k", "200", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert text("--temperature", "0") == text() != drawn[0]
    assert text("--repetition-penalty", "5") != text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0.5"], "--top-p is for tokens that are drawn: give a --temperature above 0, too"),
        (["--temperature", "-2"], "temperature is -2.0, expected 0"),
        (["--temperature", "1", "--top-k", "-3"], "top_k is -3, expected 0"),
    ],
)
def test_generate_refuses_what_it_cannot_draw_from(options, message, model_folder, tmp_path):
    result = run("generate", model_folder, "hi", "--raw", *options, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
