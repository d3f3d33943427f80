"""Imports run one way, as docs/architecture.md says."""

from __future__ import annotations

import ast
from pathlib import Path

import countdown

PACKAGE = Path(countdown.__file__).parent
# From the bottom up; what stands in one row may import each other.
ROWS = [
    ["errors"],
    ["autocast", "config", "files", "finite", "hub", "memory", "noise", "progress", "wrappers"],
    ["artifacts", "parts", "registry", "text", "loading", "results"],
    ["weights"],
    ["sums"],
    ["sequences"],
    ["allocation", "compensation", "selectors", "phase"],
    ["methods", "ops", "sites"],
    ["fusing", "modules", "replay", "static_cache"],
    ["cost", "decoding", "joint", "one_token"],
    ["profiles"],
    ["sparsify", "calibration"],
    ["engine"],
    ["evaluation"],
    ["benchmark", "integrations"],
    ["comparison", "server"],
    ["demo", "report"],
    ["cli"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}


def imported(file: Path) -> set[str]:
    """The parts of this package that a file imports, also inside of functions; not those for types alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("countdown"):
            names = [node.module] if node.module != "countdown" else [f"countdown.{a.name}" for a in node.names]
            found |= {name.split(".")[1] for name in names}
    return found - {"__version__"}


def test_imports_run_one_way():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        wrong += [f"{file.name} of {part} imports {other}" for other in imported(file) if RANK[other] > RANK[part]]
    assert not wrong


def test_every_part_has_a_place():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__pycache__"} == set(RANK)
