"""What is dropped, predicted linearly from the input: least squares over the text, the model dense.

What would be dropped at each sparsity is computed beside what the model computes, which drops nothing. So one reading
serves all sparsities. By threshold it is what lies below the quantile of all that the site has seen so far; the
thresholds that serve are estimated afterwards, with what is predicted in place.

A token counts by how small its output is, as what comes behind an FFN feels errors relative to that: Gemma normalises
the output, and there are tokens whose is smaller by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.calibration.looks import Looks
from countdown.calibration.passes._base import Assignment, Pass, Run, decoding, never_ran, register
from countdown.compensation.affine import fits
from countdown.errors import TextError
from countdown.memory import memory_for, memory_of
from countdown.ops.reference import drop_smallest
from countdown.progress import say
from countdown.sites import Site
from countdown.sums import Sum
from countdown.sums._base import product_of

# The sparsities that it is fitted for, beside the one that was asked for.
LEVELS = (0.5, 0.7, 0.9)
# Tokens that each input needs at least.
TOKENS_EACH = 2
# Of what square of an output, relative to their mean, a token counts most; smaller ones no more.
SMALL = 1e-4


class AffinePass(Pass):
    """Adds the artifacts of `compensation.affine`."""

    name, rank = "affine", 2

    def check(self, run: Run) -> None:
        """See `Pass.check`; also says how much memory sums take.

        Raises:
            TextError: Too little text for so many inputs.
        """
        tokens = sum(sequence.numel() for sequence in run.sequences)
        widest = max(one.site.sum.weights[0].shape[1] for one in run.wanting(self.name))
        if tokens < TOKENS_EACH * widest:
            raise TextError(
                f"the text has {tokens} tokens, and to predict from {widest} inputs what is dropped takes "
                f"{TOKENS_EACH * widest} at least: give more text or --tokens, or --compensate none."
            )
        groups = _groups(run)
        if run.progress:
            most = max(sum(map(_bytes_of, group)) for group in groups)
            how = f", in {len(groups)} readings of the text" if len(groups) > 1 else ""
            say(f"predicting what is dropped: sums take {most / 1e9:.2f} GB beside the model's weights{how}")

    def readings(self, run: Run) -> int:
        """See `Pass.readings`."""
        return len(_groups(run))

    def run(self, run: Run) -> None:
        for group in _groups(run):
            self._fit(run, group)

    def _fit(self, run: Run, group: Sequence[Assignment]) -> None:
        sums = {one.site.name: _Sums(one, _levels(run, one)) for one in group}

        def observe(site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> None:
            sums[site.name].add(sum_, x, factors)

        how = {"doing": "adding up sums of what is dropped", "instead": "take compensate 'none'"}
        with memory_for(sum(map(_bytes_of, group)), **how):
            with decoding(run.model, [one.site for one in group], observe) as feed:
                for batch in run.track(run.batches(run.sequences), "what is dropped"):
                    feed(batch)
            for one in group:
                one.artifacts |= sums.pop(one.site.name).fits()


def _groups(run: Run) -> list[list[Assignment]]:
    """Return the sites, as many together as half of the memory holds sums of that the model leaves."""
    device = next(run.model.parameters()).device
    room = (memory_of(device) - sum(parameter.nbytes for parameter in run.model.parameters())) // 2
    groups: list[list[Assignment]] = [[]]
    for one in run.wanting(AffinePass.name):
        if groups[-1] and sum(map(_bytes_of, [*groups[-1], one])) > room:
            groups.append([])
        groups[-1].append(one)
    return groups


def _bytes_of(one: Assignment) -> int:
    """Return the bytes of a site's sums, for as many sparsities as there may be."""
    d, outputs = one.site.sum.weights[0].shape[1], one.site.sum.outputs
    return 4 * (d + 1) * (d + 1 + (1 + len(LEVELS)) * outputs)


def _levels(run: Run, one: Assignment) -> list[float]:
    """Return the sparsities of a site that are fitted, ascending; in thousandths, rounded down so as to serve it."""
    found = {math.floor(round(1000 * run.allocated(level)[one.site.name], 6)) / 1000 for level in (None, *LEVELS)}
    return sorted(found - {0.0}) or list(LEVELS)


class _Sums:
    """C_xx of a site, and C_rx at each sparsity.

    Args:
        one: The site and its method.
        levels: The sparsities.
    """

    def __init__(self, one: Assignment, levels: Sequence[float]) -> None:
        self._one, self._levels = one, levels
        self._inputs: Tensor | None = None
        self._dropped: list[Tensor] = []
        self._looks = Looks(len(one.method.drops), one.site.device)
        self._squares: Tensor | float = 0.0  # ‖y‖², added up over tokens
        self._tokens = 0

    def add(self, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> None:
        """Add the tokens of a call, all of them dense."""
        inputs = F.pad(x.flatten(0, -2).float(), (0, 1), value=1.0)
        if self._inputs is None:
            self._inputs = inputs.new_zeros((inputs.shape[1], inputs.shape[1]))
            self._dropped = [inputs.new_zeros((sum_.outputs, inputs.shape[1])) for _ in self._levels]
        coefficients = product_of(factors).flatten(0, -2)
        weighted = self._weights(sum_.weights[-1].product(coefficients)) * inputs
        self._inputs.addmm_(weighted.T, inputs)
        indicator = self._one.indicator(sum_, x, factors).flatten(0, -2)
        second = self._one.second_indicator(factors)
        again = None if second is None else second.flatten(0, -2)
        self._looks.add(indicator, again)
        for level, dropped in zip(self._levels, self._dropped, strict=True):
            rest = torch.where(self._active(level, indicator, again), 0, coefficients)
            dropped.addmm_(sum_.weights[-1].product(rest).float().T, weighted)

    def _weights(self, y: Tensor) -> Tensor:
        """Return for how much tokens count `[tokens, 1]`, by their outputs `[tokens, outputs]`."""
        squares = y.float().square().sum(dim=-1, keepdim=True)
        self._squares += squares.sum()
        self._tokens += len(squares)
        mean = self._squares / self._tokens
        return torch.where(mean > 0, mean / (squares + SMALL * mean), 1.0)

    def _active(self, level: float, indicator: Tensor, again: Tensor | None) -> Tensor:
        method = self._one.method.at(self._one.site.name, level)
        if method.decision == "topk":
            return drop_smallest(indicator, method.drop(indicator.shape[-1]))
        return self._looks.active(method.drops, indicator, again)

    def fits(self) -> dict[str, Tensor]:
        """Return the artifacts."""
        if self._inputs is None:
            raise never_ran(self._one.site.name)
        ridge: float = self._one.method.ridge  # type: ignore[attr-defined]
        return fits(self._levels, self._inputs, self._dropped, ridge)


register(AffinePass())
