"""The same sparsity for every decoder layer, divided among its linears where the layer's output suffers least."""

from __future__ import annotations

from countdown.allocation._base import Allocation, Problem, register
from countdown.artifacts import PATH, value_at
from countdown.errors import ProfileError


class Greedy(Allocation):
    """Block-wise greedy allocation (TEAL, arXiv 2408.14690, Algorithm 1); the pass `greedy` has what is ours.

    Calibration leaves each linear's sparsity as a function of its layer's, so every layer meets any target without
    another search.
    """

    name = "greedy"
    kinds = ("linear",)
    artifacts = (PATH,)
    passes = ("greedy",)

    def allocate(self, problem: Problem) -> dict[str, float]:
        if any(PATH.name not in problem.artifacts[name] for name in problem.sizes):
            raise ProfileError("the profile was not calibrated for allocation 'greedy'; calibrate again with it.")
        return {name: value_at(problem.artifacts[name][PATH.name], problem.sparsity) for name in problem.sizes}


register(Greedy())
