"""The base of every compensation, and the list of them. This file needs no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, ClassVar

from countdown.parts import Keeper
from countdown.registry import Registry, classes_of

if TYPE_CHECKING:
    from torch import Tensor

    from countdown.artifacts import Artifacts
    from countdown.sums import Sum
    from countdown.weights import Weight

    Shape = tuple[int | None, int | None]


class Compensation(Keeper):
    """Adds to the sum over a token's active terms what stands for the others.

    It keeps parts, made from a site's weights. Ops receive it by name, with its parts, which follow those of the
    selector.

    A subclass is a frozen dataclass, of which equal ones are the same compensation; what an instance holds says how
    large its parts are.
    """

    name: ClassVar[str]  # under which ops receive it

    @staticmethod
    @abstractmethod
    def shapes(d: int, terms: int) -> tuple[Shape, ...]:
        """Return rows and columns of each part for inputs of size d; None where they do not follow."""

    @staticmethod
    @abstractmethod
    def problem(sum_: Sum, parts: Sequence[Weight]) -> str | None:
        """Return why parts do not fit a sum, None if they do."""

    @staticmethod
    @abstractmethod
    def added(x: Tensor, dropped: Tensor, sparse: Tensor, parts: Sequence[Weight]) -> Tensor:
        """Return what is added `[..., outputs]`, in the dtype of x; the truth that kernels are tested against.

        Args:
            x: The input `[..., d]`.
            dropped: Which terms each token drops, bool `[..., terms]`; none of one that is computed densely, nor of
                padding.
            sparse: Which tokens are neither of these, bool `[..., 1]`.
            parts: The compensation's own weights.
        """

    def taken(self, artifacts: Artifacts) -> object:
        """Return what of the artifacts `make` takes: it makes the same of the same."""
        return self

    @abstractmethod
    def cut(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Weight, ...]:
        """Return the parts that `make` would return, out of those of a lower sparsity."""

    @abstractmethod
    def fitted(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Weight, ...]:
        """Return the parts in the dtype and on the device of the sum's weights, as kernels read them."""

    @abstractmethod
    def bytes_read(self, sum_: Sum, active: float) -> float:
        """Return the bytes of its parts that a token reads where this share of the terms is active."""


COMPENSATIONS: Registry[type[Compensation]] = Registry(
    "compensation", "countdown.compensation", name=attrgetter("name"), check=classes_of(Compensation)
)
register = COMPENSATIONS.register
