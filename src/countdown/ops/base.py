"""The base of every backend: what it takes, how it wants weights laid out, and that it computes a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, bfloat16, float16, float32

from countdown.ops.call import Call
from countdown.selectors import Selector
from countdown.sums import Sum
from countdown.weights import Plain, Weight
from countdown.weights.symmetric import Symmetric4, Tiles4

# More tokens than this in a call are computed densely and masked: their active sets share too little to gather.
MOST_TOKENS = 8


class Backend(ABC):
    """Computes calls on the devices of one type; what it refuses, the reference computes."""

    name: ClassVar[str]  # in COUNTDOWN_BACKEND and in `status`
    device: ClassVar[str]  # type of torch device
    key: ClassVar[str]  # torch's dispatch key of that device
    runs_on: ClassVar[str]  # as messages say it: `GPUs`
    dtypes: ClassVar[Collection[object]] = (float32, float16, bfloat16)  # of x

    @abstractmethod
    def missing(self) -> str | None:
        """Return why this backend cannot run here, None if it can."""

    @abstractmethod
    def refuses(
        self,
        sum_: Sum,
        selector: Selector | None,
        parts: Sequence[Weight],
        rule: str,
        *,
        compensation: str = "",
        laid_out: bool = True,
    ) -> str | None:
        """Return why calls of this form are not for this backend, None if they are.

        Args:
            sum_: What is summed.
            selector, parts: What decides, and its weights; None and none where active sets are given.
            rule: `threshold` or `topk`.
            compensation: The name of what is added for inactive terms, "" for nothing.
            laid_out: Whether weights are laid out already, or will be.
        """

    def lay_out(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Sequence[Weight], Sequence[Weight]]:
        """Return weights and parts as calls should have them; the very same objects where nothing changes."""
        return sum_.weights, [in_rows(part) for part in parts]

    def step_ops(self) -> Mapping[str, Callable[..., Any]]:
        """Return implementations of the ops of decode loops, those of `ops.dense` and `ops.together`, by name."""
        return {}

    @abstractmethod
    def run(self, call: Call) -> Tensor:
        """Return the result of a checked call that is not refused, of 1 to `MOST_TOKENS` tokens."""

    def again(self, op: str, args: tuple[Any, ...], names: dict[str, Any]) -> Tensor | None:
        """Return the result of an op's arguments where a call like it was run before, else None.

        Checks and refusals look at names, shapes, strides and dtypes alone. A backend whose calls take less time than
        they do can keep those of the calls that it has run, and needs no second look at calls of the same.
        """
        return None


class Gathering(Backend):
    """A backend whose kernels gather the rows of active terms, and what all such backends refuse."""

    formats: ClassVar[Collection[str]] = (Plain.format,)
    part_formats: ClassVar[Collection[str]] = (Symmetric4.format, Tiles4.format)
    activations: ClassVar[Collection[str]] = ("silu", "gelu_tanh", "gelu", "relu")
    selectors: ClassVar[Mapping[str, Collection[str]]]  # by kind of sum
    compensations: ClassVar[Mapping[str, Collection[str]]] = MappingProxyType({})  # by kind of sum

    def refuses(
        self,
        sum_: Sum,
        selector: Selector | None,
        parts: Sequence[Weight],
        rule: str,
        *,
        compensation: str = "",
        laid_out: bool = True,
    ) -> str | None:
        if sum_.kind not in self.selectors:
            return f"it has no kernel for sums of kind '{sum_.kind}'"
        if compensation and compensation not in self.compensations.get(sum_.kind, ()):
            return f"it has no kernel for compensation '{compensation}'"
        if selector is not None and (reason := self._refuses_decision(sum_.kind, selector, parts, rule)):
            return reason
        for weight in sum_.weights:
            if weight.format not in self.formats:
                return f"it has no kernel for weights in format '{weight.format}'"
            if weight.format == Plain.format and weight.parts[0].dtype not in self.dtypes:
                return f"it has no kernel for {weight.parts[0].dtype}"
        if sum_.activation and sum_.activation not in self.activations:
            return f"it has no kernel for activation '{sum_.activation}', only: {', '.join(self.activations)}"
        return _refuses_layout(sum_, laid_out)

    def _refuses_decision(self, kind: str, selector: Selector, parts: Sequence[Weight], rule: str) -> str | None:
        if rule != "threshold":
            return f"decision '{rule}' needs a sort, which no kernel does"
        if selector.name not in self.selectors[kind]:
            return f"it has no kernel for selector '{selector.name}', only: {', '.join(self.selectors[kind])}"
        for part in parts:
            if part.format not in self.part_formats:
                return f"it has no kernel for a selector's weights in format '{part.format}'"
        return None


def in_rows(part: Weight) -> Weight:
    """Return a part that may be in tiles in rows; others are in the order of their use already."""
    return part.in_rows() if isinstance(part, Tiles4) else part


def _refuses_layout(sum_: Sum, laid_out: bool) -> str | None:
    *first, last = sum_.weights
    if not all(weight.lies_by(1) for weight in first):
        return "rows of W_gate or W_up are not contiguous"
    if laid_out and not last.lies_by(0):
        which = "W is not laid out by input channel" if sum_.kind == "linear" else "W_down is not laid out by neuron"
        return f"{which} (sparsify_ does that; a parameter put in its place later is not)"
    return None


def flat(x: Tensor) -> Tensor:
    """Return x as `[tokens, d]` with contiguous rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return tensors that kernels can index: biases of interleaved rows are strided."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def by_rank(added: Sequence[Weight]) -> list[Tensor]:
    """Return the low-rank weights of a compensation as kernels read them, none where there are none.

    Returns:
        B `[rank, d]` and A `[d_out, rank]`: what belongs to a channel, or to an output, lies side by side.
    """
    if not added:
        return []
    inner, outer = (weight.parts[0] for weight in added)
    return [_side_by_side(inner.t()).t(), _side_by_side(outer)]


def _side_by_side(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
