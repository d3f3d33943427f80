"""The gated FFNs of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from countdown.sites._base import Shape, Site
from countdown.sites.holders import Rows
from countdown.sums import Sum
from countdown.sums.gated import Gated


@dataclass(frozen=True)
class GatedFFN(Site):
    """A gated FFN, y = W_down (act(W_gate x) ⊙ W_up x) with biases where it has them; its terms are neurons.

    Args:
        gate, up, down: Where in the module each projection is; gate and up may be rows of one linear.
        activation: A key of `sums.activations.ACTIVATIONS`.
    """

    sum_class: ClassVar[type[Sum]] = Gated

    gate: Rows
    up: Rows
    down: Rows
    activation: str

    def rows(self) -> tuple[Rows, ...]:
        return self.gate, self.up, self.down

    @property
    def shape(self) -> dict[str, int | str]:
        """Hidden size d, neurons h, activation."""
        return {"kind": self.kind, "d": self.d, "h": self.h, "activation": self.activation}

    @staticmethod
    def axes(shape: Shape) -> dict[str, int]:
        return {"terms": int(shape["h"]), "inputs": int(shape["d"]), "outputs": int(shape["d"])}

    @property
    def d(self) -> int:
        """Hidden size."""
        return self.gate.of(self.module)[0].shape[1]

    @property
    def h(self) -> int:
        """Intermediate size: the number of neurons."""
        return self.gate.of(self.module)[0].shape[0]
