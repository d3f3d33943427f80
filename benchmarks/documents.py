"""Reads results files and writes Markdown, and what results say of the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Weightings that older files call otherwise.
RENAMED = {"rms-norm": "column-norm"}


def load(name: str) -> dict[str, Any]:
    """Return a results file, with the names of today."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for record in document["records"]:
        if "weighting" in record:
            record["weighting"] = RENAMED.get(record["weighting"], record["weighting"])
    return document


def commit() -> str:
    """Return the commit of this checkout."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or sys.exit("no git history here: give --commit")


def row(cells: list[str]) -> str:
    """Return a Markdown table row."""
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table, `left` of its columns aligned to the left."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(row(cells) for cells in (head, rule, *rows)) + "\n"


def said(given: list[str], model: str | None = None) -> list[str]:
    """Return a script's arguments without the model, which is somewhere on this machine, and where results go."""
    rest = iter([argument for argument in given if argument != model])
    kept: list[str] = []
    for argument in rest:
        if argument in ("--output", "--commit", "--text-dir"):
            next(rest, None)
        else:
            kept.append(argument)
    return kept
