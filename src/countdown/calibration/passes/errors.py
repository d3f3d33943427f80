"""Estimated errors of the output at every sparsity, to allocate by."""

from __future__ import annotations

import itertools

from torch import Tensor

from countdown.artifacts import ERRORS, value_at
from countdown.calibration.passes._base import Assignment, Pass, Run, register
from countdown.calibration.passes.sketches import sketch_sparse
from countdown.calibration.passes.slopes import chord, kl_curvatures, kl_slopes

# Error curves are estimated on every so many-th sequence; their scales in so many rounds over the text, as a mean over
# so many of the last ones, each going this part of the way to what looks best then.
ERROR_STRIDE = 4
ROUNDS = 16
MEMORY = 8
STEP = 0.4


class ErrorsPass(Pass):
    """A site's estimate is the expected squared error of its output, E Σ c_i²‖w_i‖² over the terms it drops, as a
    function of sparsity. At the allocated sparsity it is scaled to the KL of the whole model: to rise as that does or,
    where linears are among the sites, to be what this error makes of it alone. What is allocated moves the scales, so
    this is repeated.
    """

    name, rank = "errors", 1

    def run(self, run: Run) -> None:
        judged = self._judged(run)
        if not judged:
            return
        now = {one.site.name: one.method.sparsity for one in run.assigned}
        sketches = sketch_sparse(
            run, run.shuffled[::ERROR_STRIDE], itertools.repeat(now), losses=True, label="errors to allocate by"
        )
        local = {one.site.name: sketches[one.site.name].errors(one.site.terms) for one in judged}
        curves = {name: sketch.thresholds() for name, sketch in sketches.items()}
        # Of many small sites in a layer each one's slope drowns in the errors of the others.
        by_slope = all(one.site.kind == "ffn" for one in run.assigned)
        effect, of_curve = (kl_slopes, _rise) if by_slope else (kl_curvatures, _dropped)
        scales = dict.fromkeys(local, 0.0)
        rounds = run.track(_rounds(run.shuffled), "effect of each module")
        for round_, some in enumerate(rounds, 1):
            found = effect(run.model, run.assigned, some, now, lambda name, k: value_at(curves[name], k))
            for one in judged:
                name = one.site.name
                size = of_curve(local[name], now[name])
                # A mean over the rounds that forgets the first ones, which were made elsewhere.
                scales[name] += ((found[name] / size if size else 0.0) - scales[name]) / min(round_, MEMORY)
                one.artifacts[ERRORS.name] = (local[name] * max(scales[name], 0.0)).float()
            wanted = run.allocated()
            now = {name: k + STEP * (wanted[name] - k) for name, k in now.items()}

    def readings(self, run: Run) -> int:
        return 2 if self._judged(run) else 0

    def _judged(self, run: Run) -> list[Assignment]:
        return [one for one in run.wanting(self.name) if one.method.sparsity]


def _rounds(sequences: list[Tensor]) -> list[list[Tensor]]:
    """Return other sequences for each round, each lot spread over the text."""
    count = min(ROUNDS, len(sequences))
    return [sequences[start::count] for start in range(count)]


def _rise(local: Tensor, sparsity: float) -> float:
    """Return the slope of an error curve at a sparsity, over the chord that the slopes of the KL are taken over."""
    low, high = chord(sparsity)
    return (value_at(local, high) - value_at(local, low)) / (high - low)


def _dropped(local: Tensor, sparsity: float) -> float:
    """Return the error of the terms whose curvature of the KL is taken."""
    return value_at(local, chord(sparsity)[1])


register(ErrorsPass())
