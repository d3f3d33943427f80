"""The same sparsity everywhere, as published."""

from __future__ import annotations

from countdown.allocation._base import Allocation, Problem, register


class Uniform(Allocation):
    """Asks nothing of calibration."""

    name = "uniform"
    across = True

    def allocate(self, problem: Problem) -> dict[str, float]:
        return dict.fromkeys(problem.sizes, problem.sparsity)


register(Uniform())
