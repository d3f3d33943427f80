"""Tasks of lm-eval that every configuration is scored on, with the same documents for each.

What lm-eval brings is imported where it is needed: without tasks, nothing here needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from countdown.comparison.comparison import TaskResult
from countdown.errors import ConfigError
from countdown.modules import sparse_modules

if TYPE_CHECKING:
    from countdown.integrations.lm_eval import Scores

# What a configuration scores on a task, by metric, as JSON can hold it; see `Task.score`.
Scored = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A task of lm-eval, and how much of it is scored.

    Args:
        loaded: From `integrations.lm_eval.load_tasks`, its data among it.
        limit: Only its first so many documents; None for all.
        batch_size: Sequences in a call.
    """

    loaded: Any
    limit: int | None
    batch_size: int

    @property
    def name(self) -> str:
        """As lm-eval calls it."""
        return str(self.loaded.task_name)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that scores depend on besides the model; `content` is a hash of what the task asks."""
        from countdown.integrations.lm_eval import content_hash

        about = {"limit": self.limit, "batch_size": self.batch_size, "lm_eval": version("lm-eval")}
        return about | {"content": content_hash(self.loaded, self.limit)}

    def score(self, model: nn.Module, tokenizer: Any, *, progress: bool) -> Scored:
        """Return what a model scores, every token sparse where it is sparsified.

        Args:
            model: Dense, sparsified or quantised; left as it was.
            tokenizer: Its tokenizer.
            progress: Show lm-eval's bars on stderr.

        Raises:
            ConfigError: The task fails.
            CountdownError: A token was not computed sparsely, or logits are not finite.
        """
        from countdown.integrations.lm_eval import CountdownLM, score_tasks

        mode = "all" if sparse_modules(model) else "dense"
        lm = CountdownLM(model, tokenizer, mode=mode, batch_size=self.batch_size, progress=progress)
        found = score_tasks(lm, [self.loaded], self.limit)
        return [
            {
                "task": task,
                "metric": metric,
                "filter": filter_,
                "value": one.value,
                # Of what is no mean, as perplexity, only how many there are.
                "by_document": [*map(float, one.by_document)] if one.is_mean else [None] * len(one.by_document),
            }
            for (task, metric, filter_), one in found.items()
        ]


def tasks_of(
    names: str | Sequence[str] | None,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> tuple[Task, ...]:
    """Return the tasks that are asked for, with their data.

    Args:
        names, tasks_dir: See `load_tasks`; names may be one string with commas. None for no tasks.
        limit, batch_size: See `Task`. [all, 1]

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, its data cannot be had, a number below 1, or
            settings of tasks without tasks.
    """
    if names is None:
        given = {"tasks_dir": tasks_dir, "limit": limit, "batch_size": batch_size}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name} belongs to tasks, which are not given.")
        return ()
    from countdown.integrations.lm_eval import check_counts, load_tasks

    batch_size = 1 if batch_size is None else batch_size
    check_counts(limit, batch_size)
    loaded = load_tasks(names.split(",") if isinstance(names, str) else names, tasks_dir)
    return tuple(Task(one, limit, batch_size) for one in loaded)


def results(own: Scored, dense: Scored) -> list[TaskResult]:
    """Return what a configuration scores on a task, beside the dense model on the same documents."""
    from countdown.integrations.lm_eval import compared

    return [
        TaskResult(
            task=one.task,
            metric=one.name,
            documents=one.documents,
            value=one.sparse,
            stderr=one.sparse_stderr,
            difference=one.difference,
            difference_interval=None if one.low is None or one.high is None else (one.low, one.high),
        )
        for one in compared(_scores(dense), _scores(own))
    ]


def _scores(found: Scored) -> Scores:
    from countdown.integrations.lm_eval import Scored as Metric

    return {(one["task"], one["metric"], one["filter"]): Metric(one["value"], one["by_document"]) for one in found}


def parse(found: Any) -> list[TaskResult]:
    """Return what was scored, or raise LookupError, TypeError or ValueError where it is not what `Task.score` made."""
    return results(found, found)


def described(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """Return by name what scores on tasks depend on, for a comparison's `meta`."""
    return {task.name: task.settings for task in tasks}
