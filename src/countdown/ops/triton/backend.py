"""The backend of CUDA and ROCm devices: workspaces and launches of the Triton kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from countdown.ops.base import Gathering
from countdown.ops.call import Call
from countdown.selectors import Selector
from countdown.sums import Sum
from countdown.weights import Weight

# Of a selector's own weights; those in tiles are put into rows at every call, unless `lay_out` did.
PARTS = ("symmetric-4", "symmetric-4-tiles")


class Triton(Gathering):
    """See `ops.triton`."""

    name, device, key, runs_on = "triton", "cuda", "CUDA", "GPUs"
    selectors = ("up", "gate", "proxy-4")

    def missing(self) -> str | None:
        """See `Backend.missing`."""
        if not (torch.version.cuda or torch.version.hip):
            return "this torch is built for CPUs only"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        return None

    def refuses(
        self, sum_: Sum, selector: Selector | None, parts: Sequence[Weight], rule: str, *, laid_out: bool = True
    ) -> str | None:
        """See `Backend.refuses`."""
        other = next((part.format for part in parts if part.format not in PARTS), None)
        reason = super().refuses(sum_, selector, parts, rule, laid_out=laid_out)
        return reason or (other and f"it has no kernel for a copy in format '{other}'")

    def dense_ops(self) -> Mapping[str, Callable[..., Tensor]]:
        """See `Backend.dense_ops`."""
        from countdown.ops.triton import dense_ops

        return {"project_one": dense_ops.project_one, "attend_one": dense_ops.attend_one}

    def lay_out(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Sequence[Weight], Sequence[Weight]]:
        """W_down by neuron, proxies in rows."""
        *others, down = sum_.weights
        return [*others, down.by_column()], [part.in_rows() for part in parts]

    def run(self, call: Call) -> Tensor:
        """See `Backend.run`."""
        from countdown.ops.triton import ffn

        return ffn.run(call.x, call)
