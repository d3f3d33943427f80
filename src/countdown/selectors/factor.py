"""Deciding by factors of the coefficient, computed exactly. This file needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from countdown.selectors._base import Selector, register

if TYPE_CHECKING:
    from torch import Tensor

    from countdown.sums import Sum
    from countdown.weights import Weight


@dataclass(frozen=True)
class Factor(Selector):
    """A formula on a sum's factors.

    Args:
        name: See `Selector`.
        reads: The roles of the weights that the formula depends on.
        formula: From the factors, each float32 `[..., terms]`, to the indicator, likewise: for an FFN from a = act(g)
            and u, for a linear from its input x.
    """

    indicator = "exact"

    name: str
    reads: tuple[str, ...]
    formula: Callable[..., Tensor]

    def score(self, sum_: Sum, x: Tensor, parts: Sequence[Weight], factors: Sequence[Tensor]) -> Tensor:
        return self.formula(*(factor.float() for factor in factors))


UP = register(Factor("up", reads=("up",), formula=lambda a, u: u.abs()))
GATE = register(Factor("gate", reads=("gate",), formula=lambda a, u: a.abs()))
COEFFICIENT = register(Factor("coefficient", reads=("gate", "up"), formula=lambda a, u: (a * u).abs()))
INPUT = register(Factor("input", reads=(), formula=lambda x: x.abs()))
