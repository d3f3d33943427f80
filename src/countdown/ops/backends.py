"""Registers the ops on the devices of this machine, and says which backend computes what, and why another does not.

The reference takes every call. The Triton backend takes CUDA and ROCm tensors, where torch and Triton can drive such a
device, and hands what it has no kernel for to the reference.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from countdown.ops import reference  # noqa: F401  (registers its ops)
from countdown.ops.request import VARIABLE, requested
from countdown.ops.schema import LIBRARY


def refuses_ffn(
    weights: list[Tensor],
    *,
    decision: str,
    indicator: str,
    activation: str,
    proxy_bits: int | None = None,
    laid_out: bool = True,
) -> str | None:
    """Return why the Triton backend leaves sparse FFNs of this kind to the reference, None if it computes them.

    Args:
        weights, decision, indicator, activation: As in `ops.schema`.
        proxy_bits: Bits of the proxy that decides, if one does.
        laid_out: Whether W_down is laid out by neuron already, or will be.
    """
    device = weights[0].device.type
    if device != "cuda":
        return f"it runs on GPUs, and the weights are on {device}"
    if reason := missing():
        return reason
    from countdown.ops.triton import ops

    reason = ops.refuses_decision(decision, indicator, proxy_bits)
    return reason or ops.refuses_ffn(weights, activation, laid_out=laid_out)


def missing() -> str | None:
    """Return why there is no Triton backend here, None if there is."""
    if requested() == "reference":
        return f"{VARIABLE} is 'reference'"
    return _not_installed()


def _not_installed() -> str | None:
    if not (torch.version.cuda or torch.version.hip):
        return "this torch is built for CPUs only"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def _register() -> None:
    if _not_installed():
        return
    from countdown.ops.triton import dense_ops, ops

    for op in (ops.sparse_ffn, ops.select, ops.given_ffn, dense_ops.project_one, dense_ops.attend_one):
        LIBRARY.impl(op.__name__, op, "CUDA")


_register()
