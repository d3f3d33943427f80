"""The gated FFN: y = W_down (act(W_gate x) ⊙ W_up x), summed over its neurons."""

from __future__ import annotations

from torch import Tensor

from countdown.sums._base import Shape, Sum, register
from countdown.sums.activations import ACTIVATIONS


@register
class Gated(Sum):
    """Weights gate [h, d], up [h, d], down [d, h], and biases [h], [h], [d]; its factors are a = act(g) and u."""

    kind = "ffn"
    roles = ("gate", "up", "down")
    factors = ("gate", "up")
    __slots__ = ()

    @staticmethod
    def shapes(d: int, terms: int) -> tuple[Shape, ...]:
        return (terms, d), (terms, d), (d, terms)

    @property
    def terms(self) -> int:
        """Neurons."""
        return self.weights[0].shape[0]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return a = act(W_gate x) and u = W_up x; see `Sum.project`."""
        gate, up, _ = self.weights
        return ACTIVATIONS[self.activation](gate.product(x, self.biases[0])), up.product(x, self.biases[1])

    def check(self, x: Tensor) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is '{self.activation}', expected one of: {', '.join(ACTIVATIONS)}")
        super().check(x)
