"""The options that commands share, and the switches they set."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from countdown import __version__
from countdown.config import check_seed
from countdown.errors import ConfigError
from countdown.files import unwritable_file
from countdown.methods import METHODS
from countdown.noise import LOGGERS
from countdown.profiles.recipe import SUFFIXES

# Names of stdout. A file behind one holds what else is printed, too, so numbers go there as `-` goes.
_STDOUT = ("-", "/dev/stdout", "/dev/fd/1")
NamesT = TypeVar("NamesT", str, list[str], None)
# What --method takes beside methods and recipes: calibrate picks; active sets are given to an FFN that is timed.
AUTO, GIVEN = "auto", "given"

_flags = {"debug": False, "quiet": False, "verbose": False}


def debugging() -> bool:
    """Return whether --debug was given."""
    return _flags["debug"]


def show_progress() -> bool:
    """Return whether --quiet was not given."""
    return not _flags["quiet"]


def verbose() -> bool:
    """Return whether --verbose was given."""
    return _flags["verbose"]


def _set_debug(value: bool) -> None:
    _flags["debug"] = value


def _set_quiet(value: bool) -> None:
    _flags["quiet"] = value
    # Bars of transformers and datasets, too; tqdm reads this when imported.
    if value or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _set_verbose(value: bool) -> None:
    _flags["verbose"] = value
    # transformers says much that users of countdown can do nothing about. It reads this when imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if value else "error")
    for name in () if value else LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def quieten_lm_eval() -> None:
    """Let lm-eval say errors alone, unless --verbose: it warns about what is meant, as a model that is loaded."""
    if not verbose():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)


def home(path: Path | None) -> Path | None:
    """Return a path with `~` for the user's home: shells leave it as it is in --output=~/x."""
    return None if path is None else Path(os.path.expanduser(path))


def path(*names: str, **settings: Any) -> Any:
    """Return an option that is a path; every one is made here, or is an argument with `home` for its callback."""
    return typer.Option(*names, callback=home, **settings)


def _json_target(target: str | None) -> str | None:
    """Return where numbers go, before anything is measured."""
    if target is None or target in _STDOUT:
        return target and "-"
    file = Path(os.path.expanduser(target))
    if problem := unwritable_file(file):
        raise ConfigError(f"--json: {problem}")
    return str(file)


def known_methods(given: NamesT) -> NamesT:
    """Refuse a name that no method or recipe has: a callback, because the commands load torch before anything else."""
    names: list[str] = [given] if isinstance(given, str) else given or []
    for name in names:
        if name not in (AUTO, GIVEN) and Path(name).suffix not in SUFFIXES:
            METHODS.get(name.partition(":")[0])  # settings may follow
    return given


def _checked_seed(value: int) -> int:
    check_seed(value)
    return value


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"countdown {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
]
Model = Annotated[str, typer.Argument(help="Folder, hub id, or GGUF file.", show_default=False)]
ProfileDir = Annotated[Path | None, path("--profile", help="A profile made by calibrate. [the model's own]")]
METHOD_HELP = "Method to calibrate, or a recipe: a .yaml or .json file."
MethodName = Annotated[str | None, typer.Option("--method", callback=known_methods, help=METHOD_HELP)]
Sparsity = Annotated[float | None, typer.Option(help="Share to skip, 0 to 1. [0.5, or the profile's]")]
Decision = Annotated[str | None, typer.Option(help="threshold (what runs fast) or topk (the ideal).")]
Allocation = Annotated[
    str | None, typer.Option(help="uniform; global, or of linears greedy: more where it hurts least.")
]
Weighting = Annotated[str | None, typer.Option(help="none, rms, column-norm or shared-norm.")]
Bits = Annotated[int | None, typer.Option(help="Bits of a proxy, 4 or 3, for methods that have one.")]
Alpha = Annotated[float | None, typer.Option(help="Share of r-sparse's budget for whole channels, 0 to 1. [1]")]
Compensate = Annotated[
    str | None, typer.Option(help="affine: of FFNs, add what is predicted of dropped neurons; or none, as published.")
]
SecondLook = Annotated[
    float | None,
    typer.Option(
        help="Of m-countdown and cats: by which share of the active neurons a first look keeps more and a second "
        "fewer; 0.15 is usual. [0, one look]"
    ),
]
TEXT_HELP = "wikitext2, python-docs, or a text file."
TEXTS_HELP = "wikitext2, python-docs, or a text file; give it again for a second kind. [python-docs]"
TextDir = Annotated[Path | None, path(help="Folder with WikiText-2's valid.txt and test.txt.")]
TasksDir = Annotated[Path | None, path(help="Folder with task files of your own.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many documents of each task. [all]")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Sequences of a task in a call. [1]")]
Tokens = Annotated[int, typer.Option(help="How many tokens to calibrate on.")]
Window = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window of text. [512, or the model's context if shorter]")
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the repository ships.")]
Seed = Annotated[int, typer.Option(callback=_checked_seed, help="Seed of torch's random numbers.")]
Temperature = Annotated[
    float | None, typer.Option(help="What logits are divided by; 0 takes the likeliest token. [the checkpoint's]")
]
TopK = Annotated[int | None, typer.Option(help="Only so many of the likeliest tokens. [the checkpoint's]")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest that have this probability together.")]
MinP = Annotated[float | None, typer.Option(help="Only those that have this share of the likeliest one's.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1, what is there already is less likely.")]
IncludeDerived = Annotated[
    bool, typer.Option("--include-derived", help="Store proxies and low ranks: quicker to load, larger.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote.")]
Json = Annotated[
    str | None, typer.Option("--json", callback=_json_target, help="Write the numbers to a file, or - for stdout.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", callback=_set_quiet, help="No progress.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", callback=_set_verbose, help="What libraries say, too.")]
# Eager: what other options refuse shows its traceback, too.
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show a traceback on errors.")]
