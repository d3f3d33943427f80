"""Writing whole or not at all, through what is no plain file, and beside others who write the same."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from countdown import files
from countdown.errors import AccidentError
from countdown.files import streams, unwritable, unwritable_file, whole_folder, write_text


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def drained(end: int) -> str:
    """What was written to a pipe by a file that is closed again."""
    return os.read(end, 1000).decode()


@pytest.fixture
def fifo(tmp_path):
    """A named pipe, and the end of it to read from."""
    os.mkfifo(tmp_path / "fifo")
    end = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    yield tmp_path / "fifo", end
    os.close(end)


def test_a_pipe_is_written_through(fifo):
    path, end = fifo
    assert unwritable_file(path) is None
    write_text(path, "numbers")
    assert drained(end) == "numbers"
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_link_to_a_pipe_is_written_through(fifo, tmp_path):
    path, end = fifo
    (tmp_path / "link").symlink_to(path)
    write_text(tmp_path / "link", "numbers")
    assert drained(end) == "numbers"
    assert (tmp_path / "link").is_symlink()


def test_what_a_shell_opened_is_written_through():
    end, other = os.pipe()
    path = Path(f"/dev/fd/{other}")
    assert unwritable_file(path) is None
    write_text(path, "numbers")
    assert drained(end) == "numbers"
    os.close(end)
    os.close(other)


def test_a_file_that_a_shell_opened_keeps_what_is_in_it(tmp_path):
    with (tmp_path / "log").open("w") as log:
        log.write("said before\n")
        log.flush()
        write_text(Path(f"/dev/fd/{log.fileno()}"), "numbers\n")
    assert (tmp_path / "log").read_text() == "said before\nnumbers\n"


def test_a_device_is_written_through():
    """A terminal, which cannot be replaced by mistake, as /dev/null can by root."""
    end, other = os.openpty()
    path = Path(os.ttyname(other))
    assert streams(path)
    assert unwritable_file(path) is None
    write_text(path, "numbers")
    assert drained(end) == "numbers"
    os.close(end)
    os.close(other)


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("old")
    (tmp_path / "link").symlink_to("deep/file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "deep" / "file").read_text() == "new"


def test_a_dangling_link_is_filled(tmp_path):
    (tmp_path / "link").symlink_to("elsewhere/file")
    assert unwritable_file(tmp_path / "link") is None
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"
    (tmp_path / "folder").symlink_to("made")
    with whole_folder(tmp_path / "folder") as new:
        (new / "file").write_text("new")
    assert (tmp_path / "made" / "file").read_text() == "new"
    assert (tmp_path / "folder").is_symlink()


def test_modes_are_kept(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    (tmp_path / "plain").touch()
    assert mode(path) == mode(tmp_path / "plain")
    path.chmod(0o640)
    write_text(path, "new")
    assert (path.read_text(), mode(path)) == ("new", 0o640)


def test_a_folder_keeps_its_modes_and_those_of_its_files(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o750)
    (folder / "file").write_text("old")
    (folder / "file").chmod(0o600)
    with whole_folder(folder) as new:
        (new / "file").write_text("new")
        (new / "other").write_text("new")
    assert (mode(folder), mode(folder / "file")) == (0o750, 0o600)
    assert mode(folder / "other") != 0o600


def test_half_of_a_surrogate_pair_is_escaped(tmp_path):
    write_text(tmp_path / "file", '"\ud800"')
    assert (tmp_path / "file").read_text() == r'"\ud800"'


def test_a_full_disk_is_said_without_names_that_nobody_knows(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(AccidentError) as caught:
        write_text(tmp_path / "file", "new")
    assert str(caught.value) == f"{tmp_path / 'file'} cannot be written: No space left on device."


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), KeyboardInterrupt()], ids=["fails", "interrupted"])
def test_a_file_that_is_not_written_whole_is_as_before(failure, tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")

    def fails(*_):
        raise failure

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises((AccidentError, KeyboardInterrupt)):
        write_text(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def meanwhile(monkeypatch, other) -> None:
    """Run `other` before the next rename, as another process might."""
    replace = os.replace

    def first_other(*arguments):
        monkeypatch.setattr(files.os, "replace", replace)
        other()
        replace(*arguments)

    monkeypatch.setattr(files.os, "replace", first_other)


def test_two_write_one_file(tmp_path, monkeypatch):
    meanwhile(monkeypatch, lambda: write_text(tmp_path / "file", "theirs"))
    write_text(tmp_path / "file", "ours")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "ours")]


@pytest.mark.parametrize("there", [False, True])
def test_two_write_one_folder(there, tmp_path, monkeypatch):
    def write(content: str) -> None:
        with whole_folder(tmp_path / "folder") as new:
            (new / "file").write_text(content)

    if there:
        write("old")
    meanwhile(monkeypatch, lambda: write("theirs"))
    write("ours")
    assert (tmp_path / "folder" / "file").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_another_puts_there_in_between_is_exchanged_as_well(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def between(source, target):
        calls.append(target)
        if len(calls) == 2:  # the old one is away, the new one not there yet
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "file").write_text("theirs")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", between)
    with whole_folder(tmp_path / "folder") as new:
        (new / "file").write_text("ours")
    assert (tmp_path / "folder" / "file").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_cannot_be_written_is_told_beforehand(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for path, problem in (
        (Path("/proc/x"), "/proc is not a folder that you may write to"),
        (tmp_path / "file" / "x", "file is not a folder that you may write to"),
        (tmp_path / ("x" * 300), "name too long"),
        (tmp_path / "circle", "symbolic links"),
        (tmp_path / "circle" / "x", "symbolic links"),
    ):
        assert problem in unwritable(path)
        assert problem in unwritable_file(path)
    assert "is a folder; give the name of a file" in unwritable_file(tmp_path)


def test_looking_beforehand_leaves_nothing(tmp_path):
    assert unwritable(tmp_path / "a" / "b") is None
    assert unwritable_file(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
