"""The linear layers of a model, of attention and FFN alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from countdown.sites._base import Kind, Shape, Site, register
from countdown.sites.decoder import outermost, refuse_experts, stacks, unsupported
from countdown.sites.holders import Rows, is_linear
from countdown.sums import Sum
from countdown.sums.linear import Linear


@dataclass(frozen=True)
class LinearInput(Site):
    """A linear layer, z = Σ_j x_j W[:, j]; its terms are input channels."""

    sum_class: ClassVar[type[Sum]] = Linear

    def rows(self) -> tuple[Rows, ...]:
        return (Rows(""),)

    @property
    def shape(self) -> dict[str, int | str]:
        """Input and output size."""
        out, d = self.weights[0].shape
        return {"kind": self.kind, "d": d, "out": out}

    @staticmethod
    def axes(shape: Shape) -> dict[str, int]:
        return {"terms": int(shape["d"]), "inputs": int(shape["d"])}


def find_linears(model: nn.Module) -> list[LinearInput]:
    """Return every linear in the decoder's layers, in order: of attention and FFN alike.

    Linears of another kind than `nn.Linear` are among them; `check_untouched` refuses them when they are chosen.

    Raises:
        UnsupportedModelError: There are none, or the layers have experts.
    """
    found_stacks = stacks(model)
    refuse_experts(model, found_stacks)
    found = [
        LinearInput(name, module)
        for stack in found_stacks
        for path, layer in stack
        for name, module in outermost(layer, path, is_linear)
    ]
    if not found:
        raise unsupported(model, "its layers have no torch.nn.Linear.")
    return found


register(Kind(LinearInput, find_linears))
