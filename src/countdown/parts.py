"""Parts: weights that stand beside those of a site and are made from them, and who keeps some.

This file needs no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from countdown.artifacts import Artifact, Artifacts

if TYPE_CHECKING:
    from countdown.sums import Sum
    from countdown.weights import Weight

    Shape = tuple[int | None, int | None]


class Keeper(ABC):
    """May keep weights of its own, its parts: a selector or a compensation.

    A subclass is a frozen dataclass, of which equal ones make the same parts.
    """

    artifacts: tuple[Artifact, ...] = ()  # those of the site that `make` needs
    derived: bool = True  # made of weights as well; else artifacts alone are the parts, and there is nothing to store

    @abstractmethod
    def make(self, sum_: Sum, artifacts: Artifacts) -> tuple[Weight, ...]:
        """Return the parts for a site."""

    @abstractmethod
    def part_bytes(self, sum_: Sum) -> int:
        """Return the bytes of the parts that `make` would return."""

    @abstractmethod
    def shapes(self, d: int, terms: int) -> Sequence[Shape]:
        """Return rows and columns of each part for inputs of size d; None where they do not follow."""

    @property
    def keeps(self) -> bool:
        """Whether it has parts. How many does not depend on sizes."""
        return bool(self.shapes(1, 1))

    def made_from(self, sum_: Sum) -> Sequence[Weight]:
        """Return the weights of which `make` makes the parts."""
        return sum_.weights

    def made_as(self, sum_: Sum) -> str:
        """Return what parts depend on besides the values of weights and artifacts, for the hash of stored ones."""
        return repr(self)

    def out_of(self, sum_: Sum, stored: Sequence[Weight]) -> Sequence[Weight] | None:
        """Return the parts that `make` would return, out of stored ones; None where these do not hold them.

        Args:
            sum_: What is summed.
            stored: Parts that a keeper of the same class made, of the same weights and artifacts and by the same
                `made_as`.
        """
        return stored
