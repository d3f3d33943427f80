"""What configurations score on tasks, as tables that the terminal and the report show."""

from __future__ import annotations

from dataclasses import dataclass

from countdown.comparison.comparison import Cell, Comparison
from countdown.comparison.formats import NOT_MEASURED, count

HEADER = ["standard error", "difference", "95% interval"]
NOTE = (
    "Every token is sparse; differences are from dense, on the same documents, with Student's t intervals over the "
    "differences by document."
)


@dataclass(frozen=True)
class TaskTable:
    """A metric of a task, a row for each configuration.

    Args:
        title: Task and metric, and how many documents were scored.
        header, rows: The label, the metric, and `HEADER`.
    """

    title: str
    header: list[str]
    rows: list[list[str]]


def task_tables(comparison: Comparison) -> list[TaskTable]:
    """Return a table for each metric of each task that was scored, in their order."""
    return [_table(comparison, task, metric) for task, metric in comparison.metrics()]


def documents(comparison: Comparison, task: str) -> str:
    """Return how many documents of a task were scored, and which."""
    number = next(one.documents for cell in comparison.cells for one in cell.tasks if one.task == task)
    limited = comparison.meta.get("tasks", {}).get(task, {}).get("limit") is not None
    return f"{'the first ' if limited else ''}{count(number, 'document')}"


def _table(comparison: Comparison, task: str, metric: str) -> TaskTable:
    title = f"{task}, {metric}: {documents(comparison, task)}"
    rows = [[cell.label, *_numbers(cell, task, metric)] for cell in comparison.cells]
    return TaskTable(title, ["configuration", metric, *HEADER], rows)


def _numbers(cell: Cell, task: str, metric: str) -> list[str]:
    one = cell.scored(task, metric)
    if one is None:
        return [NOT_MEASURED, "", "", ""]
    error = "" if one.stderr is None else f"{one.stderr:.4f}"
    if cell.kind == "dense":
        return [f"{one.value:.4f}", error, "", ""]
    ends = one.difference_interval
    interval = "" if ends is None else f"{ends[0]:+.4f} to {ends[1]:+.4f}"
    return [f"{one.value:.4f}", error, f"{one.difference:+.4f}", interval]
