"""A linear layer: z = Σ_j x_j W[:, j], summed over its input channels."""

from __future__ import annotations

from torch import Tensor

from countdown.sums._base import Shape, Sum, register


@register
class Linear(Sum):
    """One weight [d_out, d] and its bias [d_out]; the one factor is the input."""

    kind = "linear"
    roles = ("weight",)
    factors = ("input",)
    __slots__ = ()

    @staticmethod
    def shapes(d: int, terms: int) -> tuple[Shape, ...]:
        return ((None, d),)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return x itself; see `Sum.project`."""
        return (x,)
