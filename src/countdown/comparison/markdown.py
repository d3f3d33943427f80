"""A comparison as the tables of a paper, in GitHub-flavoured Markdown: a row for each method, a column a sparsity."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from countdown.comparison.comparison import KINDS, Cell, Comparison
from countdown.comparison.conditions import calibrated, computed_by, machine, quality_measured, speed_measured
from countdown.comparison.formats import NOT_MEASURED, change, digits_apart, number, times
from countdown.comparison.series import all_series
from countdown.comparison.task_tables import documents

LEGEND = (
    f"Columns are target sparsities. {NOT_MEASURED} was not measured; what is empty is no part of this comparison. "
    "Intervals, realised sparsities and bytes are in comparison.csv."
)


def render(comparison: Comparison) -> str:
    """Return perplexity, each metric of each task, and speed where it was measured, with what must be said beside."""
    parts = [f"# {_escaped(_model(comparison))}", LEGEND, _perplexity(comparison)]
    parts += [_task(comparison, task, metric) for task, metric in comparison.metrics()]
    parts += [_speed(comparison)] if any(cell.speed for cell in comparison.cells) else []
    parts += _listed("Failed", [f"{cell.label}: {cell.error}" for cell in comparison.cells if cell.error])
    parts += _listed("Caveats", comparison.meta.get("caveats") or [])
    return "\n\n".join(parts) + "\n"


def _perplexity(comparison: Comparison) -> str:
    measured = f"{quality_measured(comparison)}, every token sparse (protocol all)"
    title = "Perplexity, and its change against dense"
    return _section(comparison, title, measured, _perplexity_of)


def _task(comparison: Comparison, task: str, metric: str) -> str:
    about = comparison.meta.get("tasks", {}).get(task, {})
    version = f", lm-eval {about['lm_eval']}" if "lm_eval" in about else ""
    measured = f"{documents(comparison, task)} of {task}{version}, every token sparse (protocol all)"
    title = f"{task}, {metric} ± its standard error, and the difference from dense"
    return _section(comparison, title, measured, lambda cell: _score_of(cell, task, metric))


def _speed(comparison: Comparison) -> str:
    measured = f"{speed_measured(comparison.meta)}, generated tokens sparse (protocol decode)"
    return _section(comparison, "Tokens/s, and × dense in the same rounds", measured, _speed_of)


def _perplexity_of(cell: Cell) -> str | None:
    quality = cell.quality
    # A file has null for what is not finite.
    if quality is None or quality.perplexity is None or quality.loss is None:
        return None
    perplexity = number(quality.perplexity, digits_apart(quality.perplexity, 1, 2))
    if cell.kind == "dense":
        return perplexity
    return f"{perplexity} ({change(quality.loss, digits_apart(100 * quality.loss, 0, 1))})"


def _score_of(cell: Cell, task: str, metric: str) -> str | None:
    one = cell.scored(task, metric)
    if one is None:
        return None
    value = number(one.value, max(digits_apart(one.value, landmark, 4) for landmark in (0, 1)))
    error = "" if one.stderr is None else f" ± {number(one.stderr, digits_apart(one.stderr, 0, 4))}"
    if cell.kind == "dense":
        return f"{value}{error}"
    return f"{value}{error} ({one.difference:+,.{digits_apart(one.difference, 0, 4)}f})"


def _speed_of(cell: Cell) -> str | None:
    speed = cell.speed
    if speed is None:
        return None
    rate = number(speed.tokens_per_s, digits_apart(speed.tokens_per_s, 0, 1))
    if cell.kind == "dense":
        return rate
    return (
        f"{rate} (unreliable)" if cell.doubt else f"{rate} ({times(speed.speedup, digits_apart(speed.speedup, 1, 2))})"
    )


def _section(comparison: Comparison, title: str, measured: str, tell: Callable[[Cell], str | None]) -> str:
    """Return a table with its title and how it was measured.

    Args:
        comparison: What was found.
        title: What the numbers are.
        measured: On what, how much of it, and by which protocol.
        tell: Returns the numbers of a cell; None where it has none.
    """
    meta = comparison.meta
    said = [_model(comparison), measured, calibrated(meta), machine(meta), computed_by(meta)]
    line = "; ".join(_escaped(one) for one in said if one)
    return f"## {_escaped(title)}\n\n{line}.\n\n{_table(comparison, tell)}"


def _table(comparison: Comparison, tell: Callable[[Cell], str | None]) -> str:
    def told(cell: Cell | None) -> str:
        return "" if cell is None else tell(cell) or ("failed" if cell.error else NOT_MEASURED)

    rows = _rows(comparison)
    sparsities = sorted({sparsity for _, at in rows for sparsity in at if sparsity is not None})
    header = ["method", "without sparsity", *(f"{100 * sparsity:g}%" for sparsity in sparsities)]
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [[name, *(told(at.get(sparsity)) for sparsity in (None, *sparsities))] for name, at in rows]
    escaped = [[_escaped(text) for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *escaped))


def _rows(comparison: Comparison) -> list[tuple[str, dict[float | None, Cell]]]:
    """Return by method its cells by sparsity, None where there is none: dense, sparse ones, quantised ones."""
    whole = {kind: [(c.label, {c.sparsity: c}) for c in comparison.cells if c.kind == kind] for kind in KINDS}
    sparse = [(one.name, {cell.sparsity: cell for cell in one.cells}) for one in all_series(comparison.cells)]
    return [*whole["dense"], *sparse, *whole["quantised"]]


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {_escaped(line)}" for line in lines)] if lines else []


def _model(comparison: Comparison) -> str:
    return str(comparison.meta.get("model") or "a model")


def _escaped(text: str) -> str:
    """Return text on one line that Markdown shows as it is, in a table, too."""
    return re.sub(r"([\\`*_{}\[\]<>|~$#&])", r"\\\1", " ".join(text.split()))
