"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unwritable(path: Path) -> str | None:
    """Return why `path` cannot be made, as far as can be told beforehand; None if it can."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if parent.is_dir() and os.access(parent, os.W_OK):
        return None
    return f"{path} cannot be written: {parent} is not a folder that you may write to."


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Within the context, an empty folder to fill; afterwards it is in the place of `path`.

    When something fails or is interrupted, it is gone, and what was at `path` is there as before.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the final rename stays on one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        (scratch / "new").mkdir()
        yield scratch / "new"
        _swap(scratch / "new", path, scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(new: Path, path: Path, old: Path) -> None:
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
