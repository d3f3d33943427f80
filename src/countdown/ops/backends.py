"""Registers the ops on the devices of this machine, and says which backend computes what, and why another does not.

The reference takes every call. The Triton backend takes CUDA and ROCm tensors, where torch and Triton can drive such a
device; the CPU backend takes CPU tensors, where its library was built. Both hand what they have no kernel for to the
reference.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from countdown.ops import gathering, reference  # noqa: F401  (registers its ops)
from countdown.ops.cpu import library
from countdown.ops.request import VARIABLE, requested
from countdown.ops.schema import LIBRARY

# By type of device, whose kernels it has.
BY_DEVICE = {"cuda": "triton", "cpu": "cpu"}
RUNS_ON = {"triton": "GPUs", "cpu": "CPUs"}


def refuses_ffn(
    weights: list[Tensor],
    *,
    decision: str,
    indicator: str,
    activation: str,
    proxy_bits: int | None = None,
    laid_out: bool = True,
) -> str | None:
    """Return why the backend of the weights' device leaves sparse FFNs of this kind to the reference, None if not.

    Args:
        weights, decision, indicator, activation: As in `ops.schema`.
        proxy_bits: Bits of the proxy that decides, if one does.
        laid_out: Whether W_down is laid out by neuron already, or will be.
    """
    device = weights[0].device.type
    if device not in BY_DEVICE:
        return f"there are kernels for GPUs and CPUs, and the weights are on {device}"
    name, wanted = BY_DEVICE[device], requested()
    if wanted in RUNS_ON and wanted != name:
        return f"it runs on {RUNS_ON[wanted]}, and the weights are on {device}"
    if reason := missing(name):
        return reason
    reason = gathering.refuses_decision(decision, indicator, proxy_bits, name)
    return reason or gathering.refuses_ffn(weights, activation, laid_out=laid_out)


def missing(name: str) -> str | None:
    """Return why there is no backend of this name, `triton` or `cpu`, here; None if there is."""
    if requested() == "reference":
        return f"{VARIABLE} is 'reference'"
    return library.missing() if name == "cpu" else _no_triton()


def _no_triton() -> str | None:
    if not (torch.version.cuda or torch.version.hip):
        return "this torch is built for CPUs only"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def _register() -> None:
    if library.missing() is None:
        from countdown.ops.cpu import dense_ops as cpu_dense
        from countdown.ops.cpu import ops as cpu_ops

        for op in (cpu_ops.sparse_ffn, cpu_ops.select, cpu_ops.given_ffn, cpu_dense.project_one, cpu_dense.attend_one):
            LIBRARY.impl(op.__name__, op, "CPU")
    if _no_triton() is None:
        from countdown.ops.triton import dense_ops, ops

        for op in (ops.sparse_ffn, ops.select, ops.given_ffn, dense_ops.project_one, dense_ops.attend_one):
            LIBRARY.impl(op.__name__, op, "CUDA")


_register()
