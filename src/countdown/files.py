"""Files and folders that are written whole or not at all, and whether they can be.

A path means what it leads to: a link stays, and what it points to is written. What is no plain file (a device, a pipe,
`>(…)` of a shell) is written through and never replaced.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from countdown.errors import AccidentError

_SCRATCH = ".countdown-"
# Names of open files: a plain file behind one belongs to whoever opened it, as a shell does for `2> log`.
_OPENED = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
# Of exchanging a folder that other processes exchange, too.
_TURNS = 100


def streams(path: Path) -> bool:
    """Return whether what is written to `path` flows through it, so that there is nothing to replace."""
    plain = os.path.isfile(path) and not str(path).startswith(_OPENED)
    return os.path.exists(path) and not os.path.isdir(path) and not plain


def unwritable(path: Path) -> str | None:
    """Return why no file or folder can be put at `path`, as far as can be told beforehand; None if one can."""
    try:
        target = _target(path)
        parent = next(folder for folder in (*target.parents, target) if folder.exists())
    except (OSError, ValueError) as error:
        return f"{path} cannot be written: {reason(error)}."
    try:
        # Made, as permissions do not tell: nobody may write to /proc.
        os.rmdir(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
    except OSError:
        return f"{path} cannot be written: {parent} is not a folder that you may write to."
    return None


def unwritable_file(path: Path) -> str | None:
    """Return why no file can be written to `path`, or through it, as far as can be told beforehand; None if one can."""
    if os.path.isdir(path):
        return f"{path} is a folder; give the name of a file."
    if not streams(path):
        return unwritable(path)
    return None if os.access(path, os.W_OK) else f"{path} cannot be written: you may not write to it."


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, making its folder if need be: whole or not at all, unless it is written through.

    What is there keeps its mode, and its owner as far as this user may give it away.

    Raises:
        AccidentError: The file cannot be written.
    """
    try:
        if streams(path):
            _write(path, "a", text)
        else:
            _replace(_target(path), text)
    except OSError as error:
        raise AccidentError(f"{path} cannot be written: {reason(error)}.") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Within the context, an empty folder to fill; afterwards it is in the place of `path`.

    When something fails or is interrupted, it is gone, and what was at `path` is there as before. What it replaces
    leaves it its modes.

    Raises:
        OSError: It cannot be written.
    """
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the final rename stays on one file system.
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=target.parent))
    try:
        new = scratch / "new"
        new.mkdir()
        yield new
        for made in (new, *new.rglob("*")):
            _keep_access(target / made.relative_to(new), made)
        _exchange(new, target, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _target(path: Path) -> Path:
    """Return what a path leads to, whether it exists or not.

    Raises:
        OSError, ValueError: Nothing can have this name: it is too long, or a link that leads in a circle.
    """
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError, NotADirectoryError):
        target.stat()
    return target


def reason(error: Exception) -> str:
    """Return what went wrong in few words, without the names of files that nobody else knows of."""
    return getattr(error, "strerror", None) or str(error)


def _write(path: Path, mode: str, text: str) -> None:
    # What UTF-8 does not hold, half of a surrogate pair, is written as JSON escapes it.
    with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def _replace(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another process may be writing the same file.
    scratch = target.with_name(f"{_SCRATCH}{uuid4().hex}")
    try:
        scratch.touch(exist_ok=False)
        _keep_access(target, scratch)
        _write(scratch, "w", text)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def _keep_access(old: Path, new: Path) -> None:
    """Give `new` the mode and the owner of `old`, where there is one, as far as this user may."""
    with suppress(OSError):
        found = old.stat()
        with suppress(OSError):
            os.chown(new, found.st_uid, found.st_gid)
        new.chmod(stat.S_IMODE(found.st_mode))


def _exchange(new: Path, target: Path, scratch: Path) -> None:
    """Put a folder in the place of what is at `target`, which other processes may be doing as well."""
    for turn in range(_TURNS):
        old = scratch / f"old-{turn}"
        try:
            with suppress(FileNotFoundError):
                os.replace(target, old)
            os.replace(new, target)
            return
        except BaseException as error:
            if old.exists() and not target.exists():
                os.replace(old, target)
            taken = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not taken or turn == _TURNS - 1:
                raise
