"""Holders: how a module's parameters are read as a `Weight`. The first that holds a module is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from countdown.errors import UnsupportedModelError
from countdown.weights import FORMATS, Plain, Weight


class Holder(ABC):
    """Reads and writes the weight and bias of one kind of module."""

    computes = True  # whether the module's forward is the product of weight and input, plus bias, and no more

    @abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Return whether this module is for this holder."""

    @abstractmethod
    def read(self, module: nn.Module) -> tuple[Weight, Tensor | None]:
        """Return its weight, without copying, and its bias `[rows]`, None without one."""

    @abstractmethod
    def store(self, module: nn.Module, weight: Weight) -> None:
        """Let its parameters hold a weight of the same values in another layout; the old ones are freed."""


class PlainLinear(Holder):
    """`torch.nn.Linear`, and nothing derived from it: adapters and quantised linears compute in their own way."""

    def holds(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def read(self, module: nn.Module) -> tuple[Plain, Tensor | None]:
        return Plain((module.weight,)), module.bias  # type: ignore[arg-type, return-value]

    def store(self, module: nn.Module, weight: Weight) -> None:
        values = weight.values()
        with torch.inference_mode(False), torch.no_grad():
            values = values.clone(memory_format=torch.preserve_format) if values.is_inference() else values
            module.weight.data = values


class Foreign(PlainLinear):
    """A linear of another kind: its weight can be looked at, to tell models apart, but it computes in its own way."""

    computes = False

    def holds(self, module: nn.Module) -> bool:
        return is_linear(module) and isinstance(getattr(module, "weight", None), Tensor)


HOLDERS: list[Holder] = [PlainLinear(), Foreign()]


def holder_of(name: str, module: nn.Module, *, foreign: bool = False) -> Holder:
    """Return what reads the weight of a module.

    Args:
        name: What to call the module in messages.
        module: The module.
        foreign: Take one that computes in its own way, too.

    Raises:
        UnsupportedModelError: Nothing does.
    """
    FORMATS.discover()  # a package that adds a format adds what holds it
    for holder in HOLDERS:
        if holder.holds(module) and (holder.computes or foreign):
            return holder
    raise UnsupportedModelError(
        f"{name} is a {type(module).__module__}.{type(module).__name__}, expected a plain torch.nn.Linear: "
        "adapters and quantised modules here would be bypassed (a holder for such modules may be added)."
    )


def can_compute(module: nn.Module) -> bool:
    """Return whether some holder can stand for what a module computes."""
    FORMATS.discover()
    return any(holder.computes and holder.holds(module) for holder in HOLDERS)


@dataclass(frozen=True)
class Rows:
    """Where in a site's module one of its weights is: all rows of a linear, or some, where several are fused into one.

    Args:
        child: The name of the linear in the module, "" for the module itself.
        start, stop, step: The rows, as in a slice.
    """

    child: str
    start: int = 0
    stop: int | None = None
    step: int = 1

    @property
    def are_all(self) -> bool:
        """Whether they are all rows of the linear."""
        return self.stop is None and self.start == 0 and self.step == 1

    def linear(self, module: nn.Module) -> nn.Module:
        """Return the linear that they are rows of."""
        # At every call of every FFN: get_submodule takes three times as long.
        return (module._modules.get(self.child) or module.get_submodule(self.child)) if self.child else module

    def of(self, module: nn.Module, *, foreign: bool = False) -> tuple[Weight, Tensor | None]:
        """Return weight and bias of these rows; views, not copies.

        Args:
            module: The site's.
            foreign: See `holder_of`.

        Raises:
            UnsupportedModelError: Nothing reads such a linear.
        """
        linear = self.linear(module)
        holder = holder_of(self.child or "a linear", linear, foreign=foreign)
        weight, bias = holder.read(linear)
        if self.are_all:
            return weight, bias
        rows = slice(self.start, self.stop, self.step)
        return weight.sliced(0, rows), None if bias is None else bias[rows]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module says that it is a linear layer, of whatever kind."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the input and output size of a linear layer, also of transformers' Conv1D; None for anything else."""
    if is_linear(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return module.nx, module.nf  # type: ignore[return-value]
    return None
