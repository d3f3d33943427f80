"""The command line: parse, call the API, print. Data goes to stdout, progress and messages to stderr."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import NoReturn

from countdown.cli import cores
from countdown.cli.commands import app
from countdown.cli.options import debugging
from countdown.cli.printing import err, show_warning
from countdown.errors import OVERWRITE, CountdownError, told


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2, a defect one line and 1."""
    _mend_streams()
    warnings.showwarning = show_warning
    cores.wait_briefly()
    watch = cores.Watch()
    try:
        _run(watch)
    except CountdownError as error:
        _fail(error, str(error).replace(OVERWRITE, "--overwrite"), 2)
    except BrokenPipeError:
        # The reader of stdout has gone, as `| head` does; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a path that no check foresaw
        _fail(error, str(error), 2)
    except Exception as error:
        _fail(error, f"{told(error)} (this was not foreseen; --debug shows where it happened)", 1)


def _run(watch: cores.Watch) -> None:
    try:
        app()
    except SystemExit as end:
        if not end.code and (remark := watch.remark()):
            err.print(f"warning: {remark}", markup=False)
        raise


def _mend_streams() -> None:
    """Let no answer end half-way because of where it goes: a closed stream, or one that lacks a character."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _fail(error: Exception, message: str, code: int) -> NoReturn:
    if debugging():
        raise error
    err.print(f"error: {' '.join(message.split())}", markup=False)
    sys.exit(code)
