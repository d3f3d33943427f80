"""Sites: the modules of a decoder that compute a sum of terms, of which a token needs some.

A gated FFN sums over its neurons, a linear layer over its input channels. What calibrates, stores, masks and counts
knows a site by what is declared here, and asks for no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from countdown.errors import UnsupportedModelError
from countdown.ops import proxy as proxies
from countdown.ops.activations import ACTIVATIONS


@dataclass(frozen=True)
class Site(ABC):
    """A module that sums terms, and where it sits.

    Args:
        name: The module's dotted name in the model.
        module: The module itself.
    """

    kind: ClassVar[str]
    factors: ClassVar[tuple[str, ...]]  # what `project` returns, by name; a term is their product times its column

    name: str
    module: nn.Module

    @property
    @abstractmethod
    def shape(self) -> dict[str, int | str]:
        """What identifies the site's form, as JSON can hold it."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """How many terms it sums."""

    @property
    @abstractmethod
    def matrices(self) -> tuple[Tensor, ...]:
        """Its weight matrices; the last one's columns are what is summed."""

    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """The modules that a sparse module would bypass, by dotted name."""

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the factors of every term, each `[..., terms]`, for x `[..., d]`."""

    @abstractmethod
    def combine(self, coefficients: Tensor) -> Tensor:
        """Return Σ coefficient · column, plus the bias, `[..., d_out]`, for coefficients `[..., terms]`."""

    @property
    def size(self) -> int:
        """How many weights its matrices have."""
        return sum(matrix.numel() for matrix in self.matrices)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.matrices[0].device

    def column_norms(self) -> Tensor:
        """Return ‖w_i‖₂ for each term's column w_i, float64 `[terms]`."""
        norms: Tensor = self.matrices[-1].detach().double().norm(dim=0)
        return norms


@dataclass(frozen=True)
class Rows:
    """Rows of a linear: all of them, or a slice where several projections are fused into one.

    Args:
        child: The name of the `nn.Linear` in its FFN.
        start, stop, step: The rows, as in a slice.
    """

    child: str
    start: int = 0
    stop: int | None = None
    step: int = 1

    def linear(self, module: nn.Module) -> nn.Module:
        """Return the linear that they are rows of."""
        # At every call of every FFN: get_submodule takes three times as long.
        return module._modules.get(self.child) or module.get_submodule(self.child)

    def of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of these rows; views, not copies."""
        linear = self.linear(module)
        weight, bias = linear.weight, linear.bias
        if self.stop is None and self.start == 0 and self.step == 1:
            return weight, bias  # type: ignore[return-value]
        rows = slice(self.start, self.stop, self.step)
        return weight[rows], None if bias is None else bias[rows]  # type: ignore[index]


@dataclass(frozen=True)
class GatedFFN(Site):
    """A gated FFN, y = W_down (act(W_gate x) ⊙ W_up x) with biases where it has them; its terms are neurons.

    Args:
        gate, up, down: Where in the module each projection is; gate and up may be rows of one linear.
        activation: A key of `ops.activations.ACTIVATIONS`.
    """

    kind: ClassVar[str] = "ffn"
    factors: ClassVar[tuple[str, ...]] = ("gate", "up")

    gate: Rows
    up: Rows
    down: Rows
    activation: str

    @property
    def shape(self) -> dict[str, int | str]:
        """Hidden size d, neurons h, activation."""
        return {"kind": self.kind, "d": self.d, "h": self.h, "activation": self.activation}

    @property
    def d(self) -> int:
        """Hidden size."""
        return self.matrices[0].shape[1]

    @property
    def h(self) -> int:
        """Intermediate size: the number of neurons."""
        return self.matrices[0].shape[0]

    @property
    def terms(self) -> int:
        """Neurons."""
        return self.h

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """W_gate `[h, d]`, W_up `[h, d]`, W_down `[d, h]`."""
        return tuple(rows.of(self.module)[0] for rows in (self.gate, self.up, self.down))

    def parts(self) -> Mapping[str, nn.Module]:
        """The FFN and its linears."""
        children = dict.fromkeys(rows.child for rows in (self.gate, self.up, self.down))
        linears = {f"{self.name}.{child}": self.module.get_submodule(child) for child in children}
        return {self.name: self.module, **linears}

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return a = act(W_gate x) and u = W_up x, each `[..., h]`, for x `[..., d]`."""
        g, u = (F.linear(x, *rows.of(self.module)) for rows in (self.gate, self.up))
        return ACTIVATIONS[self.activation](g), u

    def proxy(self, importance: Tensor, bits: int) -> list[Tensor]:
        """Return levels and scales of gate and of up in few bits; see `ops.proxy`."""
        gate, up = (proxies.quantise(matrix.detach(), importance, bits) for matrix in self.matrices[:2])
        return [gate.levels, gate.scales, up.levels, up.scales]

    def project_by(self, proxy: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        """Return what a proxy takes a and u for, float32, each `[..., h]`, for x `[..., d]`."""
        biases = [rows.of(self.module)[1] for rows in (self.gate, self.up)]
        return proxies.factors(x, proxy, biases, ACTIVATIONS[self.activation])

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return W_down s `[..., d]` for coefficients s `[..., h]`."""
        return F.linear(coefficients, *self.down.of(self.module))


@dataclass(frozen=True)
class LinearInput(Site):
    """A linear layer, z = Σ_j x_j W[:, j]; its terms are input channels."""

    kind: ClassVar[str] = "linear"
    factors: ClassVar[tuple[str, ...]] = ("input",)

    @property
    def shape(self) -> dict[str, int | str]:
        """Input and output size."""
        out, d = self.matrices[0].shape
        return {"kind": self.kind, "d": d, "out": out}

    @property
    def terms(self) -> int:
        """Input channels."""
        return self.matrices[0].shape[1]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """W `[d_out, d_in]`."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return (weight,)

    def parts(self) -> Mapping[str, nn.Module]:
        """The linear itself."""
        return {self.name: self.module}

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return x itself."""
        return (x,)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return W x `[..., d_out]` for x `[..., d_in]`."""
        return F.linear(coefficients, *Rows("").of(self.module))


def check_untouched(site: Site) -> None:
    """Raise UnsupportedModelError if something would be bypassed when the site's module is replaced."""
    for name, module in site.parts().items():
        check_plain(name, module)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) has hooks or a replaced forward, which a sparse module would "
                "bypass; remove them first (offloading by accelerate sets them: load without device_map)."
            )


def check_plain(name: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError if `module` is a linear of another kind than `torch.nn.Linear`."""
    if type(module) is not nn.Linear and is_linear(module):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}, expected a plain torch.nn.Linear: "
            "adapters and quantised modules here would be bypassed."
        )


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
