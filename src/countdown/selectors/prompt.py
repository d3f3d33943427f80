"""Choosing one set for a sequence, from its prompt (GRIFFIN, arXiv 2404.01365). This file needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from countdown.errors import UnsupportedModelError
from countdown.selectors._base import Selector, register

if TYPE_CHECKING:
    from torch import Tensor

    from countdown.sums import Sum
    from countdown.weights import Weight

# Tokens of each sequence that are scored at once: in float64 they take eight bytes a term.
AT_ONCE = 256


@dataclass(frozen=True)
class Prompt(Selector):
    """The set that a sequence's prompt chose, which its generated tokens are given.

    What a term is worth is scored over the prompt by `scores`; a sparse module sums scores as prompt tokens come, and
    keeps the set with the sequence (`sequences`). A token itself decides nothing, so ops receive sets, and no selector.
    """

    name = "prompt"
    indicator = "given"
    from_prompt = True
    reads = ()

    def score(self, sum_: Sum, x: Tensor, parts: Sequence[Weight], factors: Sequence[Tensor]) -> Tensor:
        """Refuse: a token has no indicator of its own.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError("a set that is chosen from the prompt cannot be told from the token at hand.")


PROMPT = register(Prompt())


def scores(coefficients: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return Σ_t (s_ti / ‖s_t‖)² over tokens t, of each term i: the square of GRIFFIN's statistic, in the same order.

    A token whose coefficients are all 0, or not all finite, adds nothing.

    Args:
        coefficients: s, float `[sequences, tokens, terms]`.
        counted: Bool `[sequences, tokens]`: which tokens count. [all]

    Returns:
        Float64 `[sequences, terms]`.
    """
    total = coefficients.new_zeros(coefficients.shape[::2]).double()
    for first in range(0, coefficients.shape[1], AT_ONCE):
        part = slice(first, first + AT_ONCE)
        squares = coefficients[:, part].double().square()
        norms = squares.sum(dim=-1, keepdim=True)
        usable = norms.isfinite() & (norms > 0)
        if counted is not None:
            usable = usable & counted[:, part, None]
        total = total + (squares / norms).where(usable, 0.0).sum(dim=1)
    return total
