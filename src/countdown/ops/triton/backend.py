"""The backend of CUDA and ROCm devices: workspaces and launches of the Triton kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from countdown.ops.base import MOST_TOKENS, Gathering, in_rows
from countdown.ops.call import Call
from countdown.ops.request import REFERENCE, requested
from countdown.ops.together import calls_of, together
from countdown.selectors import Selector
from countdown.sums import Sum
from countdown.weights import Weight

# Of a selector's own weights; those in tiles are put into rows at every call, unless `lay_out` did.
PARTS = ("symmetric-4", "symmetric-4-tiles")


class Triton(Gathering):
    """See `ops.triton`."""

    name, device, key, runs_on = "triton", "cuda", "CUDA", "GPUs"
    selectors = MappingProxyType({"ffn": ("up", "gate", "proxy-4"), "linear": ("input",)})
    compensations = MappingProxyType({"ffn": ("affine",), "linear": ("svd",)})

    def missing(self) -> str | None:
        """See `Backend.missing`."""
        if not (torch.version.cuda or torch.version.hip):
            return "this torch is built for CPUs only"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        return None

    def refuses(
        self, sum_: Sum, selector: Selector | None, parts: Sequence[Weight], rule: str, **how: Any
    ) -> str | None:
        """See `Backend.refuses`."""
        other = next((part.format for part in parts if part.format not in PARTS), None)
        reason = super().refuses(sum_, selector, parts, rule, **how)
        return reason or (other and f"it has no kernel for a copy in format '{other}'")

    def step_ops(self) -> Mapping[str, Callable[..., Any]]:
        """See `Backend.step_ops`."""
        from countdown.ops.triton import dense_ops, drawing_ops

        return {**dense_ops.OPS, **drawing_ops.OPS, "sparse_together": self._together}

    def _together(self, x: Tensor, *args: Any, **names: Any) -> Tensor:
        from countdown.ops.triton import linear

        calls = calls_of(x, *args, **names)
        # A kernel picks one of several pointers, which must be of one type.
        alike = len({(call.sum.weights[0].format, call.sum.weights[0].parts[0].dtype) for call in calls}) == 1
        alike = alike and len({bias.dtype for call in calls for bias in call.sum.biases if bias is not None}) <= 1
        taken = 1 <= calls[0].tokens <= MOST_TOKENS and x.dtype in self.dtypes and requested() != REFERENCE
        if not (alike and taken) or any(self.refuses(c.sum, c.selector, c.parts, c.rule) for c in calls):
            return together(x, *args, **names)
        y: Tensor = linear.run_together(x, calls)
        return y

    def lay_out(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Sequence[Weight], Sequence[Weight]]:
        """W_down by neuron, a linear by input channel, proxies in rows."""
        *others, down = sum_.weights
        return [*others, down.by_column()], [in_rows(part) for part in parts]

    def run(self, call: Call) -> Tensor:
        """See `Backend.run`."""
        from countdown.ops.triton import ffn, linear

        y: Tensor = (linear if call.sum.kind == "linear" else ffn).run(call.x, call)
        return y
