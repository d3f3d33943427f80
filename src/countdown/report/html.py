"""Renders a comparison as one HTML file that needs nothing else: no script, no request."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from countdown.comparison import formats
from countdown.comparison.comparison import Cell, Comparison
from countdown.comparison.conditions import measured
from countdown.comparison.series import all_series
from countdown.comparison.task_tables import NOTE, task_tables
from countdown.errors import ConfigError
from countdown.files import write_text
from countdown.report.figures import all_figures
from countdown.report.samples import Marked, mark
from countdown.report.selection import by_layer
from countdown.report.verdict import verdict

# Answers that are open; more are folded away.
OPEN_SAMPLES = 5
# Shown elsewhere on the page.
_ELSEWHERE = ("model", "wish", "prompt", "caveats", "command")


def check_installed() -> None:
    """Raise ConfigError if what the report is made with is not installed."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the report needs {' and '.join(missing)}: pip install 'countdown-llm[report]'")


def render(comparison: Comparison) -> str:
    """Return the report as HTML.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
    """
    check_installed()
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("countdown", "report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    dense = next((cell for cell in comparison.cells if cell.kind == "dense"), None)
    return environment.get_template("report.html.j2").render(
        **{name: comparison.meta.get(name) for name in _ELSEWHERE},
        cells=comparison.cells,
        failed=[cell for cell in comparison.cells if cell.error],
        recommended=comparison.recommendation.label if comparison.recommendation else None,
        verdict=verdict(comparison),
        figures=all_figures(comparison),
        tasks=task_tables(comparison),
        tasks_note=NOTE,
        dense=dense,
        samples=_samples(comparison, dense),
        open_samples=OPEN_SAMPLES,
        facts=_facts(comparison.meta),
        measured=measured(comparison, quality=True, speed=True),
        f=formats,
    )


def write_report(comparison: Comparison, path: Path) -> None:
    """Render the report and write it to `path`, whole or not at all.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
        AccidentError: The file cannot be written.
    """
    write_text(path, render(comparison))


def _samples(comparison: Comparison, dense: Cell | None) -> list[Marked]:
    """Return what configurations wrote: the recommended one first, then quantised ones and one of each method."""
    found = comparison.recommendation
    shown = [one.cell.label for one in by_layer(all_series(comparison.cells))]

    def rank(cell: Cell) -> int:
        if found and cell.label == found.label:
            return 0
        return 1 if cell.kind == "quantised" else 2 if cell.label in shown else 3

    others = sorted((cell for cell in comparison.cells if cell.kind != "dense"), key=rank)
    reference = dense.sample if dense else None
    return [mark(cell.label, cell.sample, reference) for cell in others if cell.sample]


def _facts(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Return all that the comparison says of how it was measured, but what is shown elsewhere."""
    facts = [(key, value) for key, value in meta.items() if key not in _ELSEWHERE and value not in (None, "", [], {})]
    return [(key.replace("_", " "), _fact(key, value, meta)) for key, value in facts]


def _fact(key: str, value: Any, meta: dict[str, Any]) -> str:
    if key == "identity" and isinstance(value, dict):
        return formats.described({name: part for name, part in value.items() if meta.get(name) != part})
    if key == "bandwidth" and isinstance(value, (int, float)):
        return f"{value / 1e9:,.1f} GB/s"
    return formats.described(value)
