"""Local data of the tasks in this folder, by environment variables that name where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset


def piqa(**_: Any) -> dict[str, Dataset]:
    """Return PIQA's validation split with its labels."""
    if "PIQA_DIR" not in os.environ:
        raise RuntimeError("set PIQA_DIR to the folder of valid.jsonl and valid-labels.lst")
    folder = Path(os.environ["PIQA_DIR"])
    lines, labels = (_lines(folder / name) for name in ("valid.jsonl", "valid-labels.lst"))
    rows = [json.loads(line) | {"label": int(label)} for line, label in zip(lines, labels, strict=True)]
    return {"validation": Dataset.from_list(rows)}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
