"""The command line: parse, call the API, print. Data goes to stdout, progress and messages to stderr."""

from __future__ import annotations

import os
import sys
import warnings
from typing import NoReturn

from countdown.cli import cores
from countdown.cli.commands import app
from countdown.cli.options import debugging
from countdown.cli.printing import err, show_warning
from countdown.errors import CountdownError


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2."""
    warnings.showwarning = show_warning
    cores.wait_briefly()
    watch = cores.Watch()
    try:
        _run(watch)
    except CountdownError as error:
        _fail(error)
    except BrokenPipeError:
        # The reader of stdout has gone, as `| head` does; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a path that no check foresaw
        _fail(error)


def _run(watch: cores.Watch) -> None:
    try:
        app()
    finally:
        if remark := watch.remark():
            err.print(f"warning: {remark}", markup=False)


def _fail(error: Exception) -> NoReturn:
    if debugging():
        raise error
    err.print(f"error: {' '.join(str(error).split())}", markup=False)
    sys.exit(2)
