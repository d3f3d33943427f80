"""What backends take whose kernels gather the rows of active neurons, and the form in which these kernels see it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, bfloat16, float16, float32

from countdown.ops.indicators import PROXY
from countdown.ops.proxy import bits_of
from countdown.ops.proxy_tiles import are_tiles
from countdown.ops.request import requested

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
DTYPES = (float32, float16, bfloat16)
# More tokens than this in a call are computed densely and masked: their active sets share too little to gather.
MOST_TOKENS = 8
PROXY_BITS = 4
# Indicators of exact projections, by backend.
INDICATORS = {"triton": ("up", "gate"), "cpu": ("up", "gate", "coefficient")}


def refuses_ffn(weights: list[Tensor], activation: str, *, laid_out: bool = True) -> str | None:
    """Return why no kernel sums over neurons of these weights, None if one does.

    Args:
        weights: Gate, up and down.
        activation: A key of `activations.ACTIVATIONS`.
        laid_out: Whether W_down is laid out by neuron already, or will be.
    """
    if weights[0].dtype not in DTYPES:
        return f"it has no kernel for {weights[0].dtype}"
    if activation not in ACTIVATIONS:
        return f"it has no kernel for activation '{activation}', only: {', '.join(ACTIVATIONS)}"
    gate, up, down = weights
    if not (_adjacent(gate, 1) and _adjacent(up, 1)):
        return "rows of W_gate or W_up are not contiguous"
    if laid_out and not _adjacent(down, 0):
        return "W_down is not laid out by neuron (sparsify_ does that; a parameter put in its place later is not)"
    return None


def refuses_decision(decision: str, indicator: str, bits: int | None, backend: str) -> str | None:
    """Return why no kernel of a backend decides like this, None if one does.

    Args:
        decision, indicator: See `schema`.
        bits: Of the proxy, None without one.
        backend: A key of `INDICATORS`.
    """
    if decision != "threshold":
        return f"decision '{decision}' needs a sort, which no kernel does"
    if bits not in (None, PROXY_BITS):
        return f"it has no kernel for proxies of {bits} bits, only of {PROXY_BITS}"
    if bits is None and indicator not in INDICATORS[backend]:
        known = ", ".join((*INDICATORS[backend], PROXY.name))
        return f"it has no kernel for indicator '{indicator}', only: {known}"
    return None


def _adjacent(weight: Tensor, dim: int) -> bool:
    return weight.stride()[dim] == 1 or weight.shape[dim] <= 1


def too_many(tokens: int) -> bool:
    """Return whether so many tokens are for the reference: too many to gather for, none, or asked for."""
    return not 1 <= tokens <= MOST_TOKENS or requested() == "reference"


def proxy_bits(x: Tensor, proxy: list[Tensor] | None) -> int | None:
    """Return the bits of a proxy for x `[..., d]`, None without one."""
    if proxy is None:
        return None
    return PROXY_BITS if are_tiles(proxy[0]) else bits_of(proxy[0], x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """Return x as `[tokens, d]` with contiguous rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def dense(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return tensors that kernels can index: biases of interleaved rows are strided."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
