"""Deciding by a proxy: a copy of gate and up in few bits computes the coefficient before anything exact is read.

Inputs are rounded to 8 bits a token, so that a product is one of integers. Ours; the idea is near Prox, arXiv
2607.27591.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from countdown.artifacts import IMPORTANCE, Artifacts, Moment
from countdown.selectors._base import Selector, register
from countdown.sums import Sum
from countdown.sums._base import product_of
from countdown.weights import Weight, symmetric
from countdown.weights.symmetric import BITS, FORMATS, token_steps


@dataclass(frozen=True)
class _OfSteps:
    """A part as a sum multiplies by it, given tokens in steps of this size."""

    part: Weight
    size: Tensor

    def product(self, steps: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.part.product_of_steps(steps, self.size, bias)


@dataclass(frozen=True)
class Copy(Selector):
    """|ŝ_i| of a copy of all weights but the last.

    Args:
        bits: 3 or 4.
    """

    indicator = "proxy"
    reads = ()
    moments = (Moment("input"),)
    artifacts = (IMPORTANCE,)

    bits: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """`proxy-4` or `proxy-3`."""
        return f"proxy-{self.bits}"

    def score(self, sum_: Sum, x: Tensor, parts: Sequence[Weight], factors: Sequence[Tensor]) -> Tensor:
        steps, size = token_steps(x)
        stepped = cast("Sequence[Weight]", [_OfSteps(part, size) for part in parts])
        return product_of(sum_.with_weights(stepped).project(steps)).abs()

    def prepare(self, moments: Mapping[Moment, Tensor]) -> Artifacts:
        return {IMPORTANCE.name: moments[Moment("input")].float()}

    def make(self, sum_: Sum, artifacts: Artifacts) -> tuple[Weight, ...]:
        importance = artifacts[IMPORTANCE.name]
        return tuple(
            weight.coarse(self.bits) or symmetric.quantise(weight.values().detach(), importance, self.bits)
            for weight in self.made_from(sum_)
        )

    def made_from(self, sum_: Sum) -> Sequence[Weight]:
        return sum_.weights[:-1]

    def accepts(self, formats: Sequence[str]) -> bool:
        return len(set(formats)) == 1  # which format a copy has is the weight's affair

    def shapes(self, d: int, terms: int) -> tuple[tuple[int, int], ...]:
        return (terms, d), (terms, d)

    def part_bytes(self, sum_: Sum) -> int:
        return sum(FORMATS[self.bits].bytes_of(*weight.shape) for weight in self.made_from(sum_))


COPIES = {bits: register(Copy(bits)) for bits in BITS}
