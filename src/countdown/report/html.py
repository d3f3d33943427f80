"""Renders the demo's findings as one HTML file that needs nothing else: no script, no request."""

from __future__ import annotations

import importlib.util
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

from countdown.demo import Demo
from countdown.errors import ConfigError
from countdown.evaluation.generation import first_difference
from countdown.results import hardware, versions, write_text

# Legible on white and on near-black alike.
COLOURS = ("#2a78d6", "#d9730d", "#3f9142", "#a846a0")
_INK = "#808081"  # replaced by the page's own text colour


def check_installed() -> None:
    """Raise ConfigError if what the report is made with is not installed."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the report needs {' and '.join(missing)}: pip install 'countdown-llm[report]'")


def render(demo: Demo) -> str:
    """Return the report as HTML.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
    """
    check_installed()
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("countdown", "report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        demo=demo,
        dense_perplexity=demo.rows[0].evaluation.dense_perplexity,
        plot=plot(demo),
        parted=first_difference(demo.dense.tokens, demo.sparse.tokens),
        hardware=hardware(),
        versions=versions(),
    )


def write_report(demo: Demo, path: Path) -> None:
    """Render the report and write it to `path`."""
    write_text(path, render(demo))


def plot(demo: Demo) -> str:
    """Return an SVG: perplexity against weights read, a line for each method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "countdown",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(7.2, 3.8))
        for (label, points), colour in zip(_lines(demo).items(), COLOURS, strict=False):
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        dense = demo.rows[0].evaluation.dense_perplexity
        axes.axhline(dense, color=_INK, linestyle=":", linewidth=1)
        axes.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom")
        axes.set_xlabel("share of the FFN's weight bytes read, selector included")
        axes.set_ylabel("perplexity")
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _lines(demo: Demo) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in demo.rows:
        lines[row.method.label].append((row.evaluation.weights_read, row.evaluation.perplexity))
    return lines
