"""Thresholds for every sparsity, estimated with all sites sparse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

from countdown.artifacts import SECOND_THRESHOLDS, THRESHOLDS
from countdown.calibration.passes._base import Assignment, Pass, Run, register
from countdown.calibration.passes.sketches import sketch_sparse

# The sparsities at which the sparse pass runs the model, beside the one that was asked for.
LEVELS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


class ThresholdsPass(Pass):
    """Sites are masked at several sparsities in turn."""

    name, rank = "thresholds", 3

    def run(self, run: Run) -> None:
        wanting = run.wanting(self.name)
        if not wanting:
            return
        label = f"thresholds of {'; '.join(run.recipe.labels())}"
        sketches = sketch_sparse(run, run.sequences, _schedule(run.allocated), label=label)
        for one in wanting:
            found = sketches[one.site.name]
            one.artifacts[THRESHOLDS.name] = found.thresholds()
            if len(one.method.drops) > 1:
                one.artifacts[SECOND_THRESHOLDS.name] = found.second_thresholds(partial(_drops, one))


def _drops(one: Assignment, sparsity: float) -> tuple[float, ...]:
    return one.method.at(one.site.name, sparsity).drops


def _schedule(levels: Callable[[float | None], dict[str, float]]) -> Iterator[dict[str, float]]:
    """Yield the sparsity of every site for each sequence: the targets, and `LEVELS` in turn, alternately."""
    own = levels(None)
    others = [found for level in LEVELS if (found := levels(level)) != own]
    for turn in itertools.count():
        yield own
        # Each round of levels begins one later, so that no level falls in step with texts that take turns.
        yield others[(turn + turn // len(others)) % len(others)]


register(ThresholdsPass())
