"""The dense ops of decode loops on a device that Triton compiles for; see `ops.dense`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from countdown.ops import dense as reference
from countdown.ops.base import Gathering, contiguous
from countdown.ops.request import requested
from countdown.ops.triton import dense_kernels, launch

T = TypeVar("T")
# Activations that the kernels know.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
# Entries of a row that a program can hold.
WIDEST_ROW = 32768


@launch.on_its_device
def project(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """Return the products `[T, Σ d_out]`; see `ops.dense`. Of one token at the bandwidth limit, of others torch's."""
    reference.check_projections(x, weights, biases)
    if len(x) > 1 or x.stride(1) != 1 or not all(w.is_contiguous() for w in weights) or _is_for_reference(x):
        return reference.project(x, weights, biases)
    d, heights = x.shape[1], [len(weight) for weight in weights]
    found = launch.hardware(x.device)
    config = launch.projection(d, heights, x.element_size(), found)
    has_bias = any(bias is not None for bias in biases)
    some = [_bias(weight, bias) for weight, bias in zip(weights, biases, strict=True)] if has_bias else weights
    y = x.new_empty((1, sum(heights)))
    dense_kernels.project_one[config.grid](
        x, *three(weights), *three(some), y, *(*heights, 0, 0)[:3], d, BIAS=has_bias, **config.options(found)
    )
    return y


@launch.on_its_device
def gated(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str) -> Tensor:
    """Return the product of both projections, one of them activated; see `ops.dense`. Of several tokens torch's."""
    reference.check_gated(x, weights, biases, activation)
    fits = len(x) == 1 and x.stride(1) == 1 and all(w.is_contiguous() for w in weights) and activation in ACTIVATIONS
    if not fits or _is_for_reference(x):
        return reference.gated(x, weights, biases, activation)
    h, d = weights[0].shape
    found = launch.hardware(x.device)
    config = launch.projection(d, [h], x.element_size(), found, together=2)
    y = x.new_empty((1, h))
    dense_kernels.gated_one[config.grid](
        x, *weights, *contiguous(biases), y, h, d, ACT=activation, **config.options(found)
    )
    return y


@launch.on_its_device
def normalise(x: Tensor, weight: Tensor, eps: float, rounded: bool, overlap: bool = True) -> Tensor:
    """Return the RMS norm of x; see `ops.dense`."""
    reference.check_norm(x, None, weight)
    if not _normalises(x, weight):
        return reference.normalise(x, weight, eps, rounded)
    return _normalised(x, None, None, weight, eps, rounded, overlap)


@launch.on_its_device
def add_and_normalise(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, rounded: bool, overlap: bool = True
) -> tuple[Tensor, Tensor]:
    """Return x + y and its RMS norm; see `ops.dense`."""
    reference.check_norm(x, y, weight)
    if not _normalises(x, weight):
        return reference.add_and_normalise(x, y, weight, eps, rounded)
    sums = x.new_empty(x.shape)
    return sums, _normalised(x, y, sums, weight, eps, rounded, overlap)


def _normalises(x: Tensor, weight: Tensor) -> bool:
    """Return whether there is a kernel: it fetches the weight before it waits for what could have copied it."""
    return 0 < x.shape[-1] <= WIDEST_ROW and weight.is_contiguous() and not _is_for_reference(x)


def _normalised(
    x: Tensor, y: Tensor | None, sums: Tensor | None, weight: Tensor, eps: float, rounded: bool, overlap: bool
) -> Tensor:
    d = x.shape[-1]
    some = [None if one is None else _rows(one) for one in (x, y)]
    out = x.new_empty(x.shape)
    config = launch.normalisation(out.numel() // d, d)
    strides = [0 if one is None else one.stride(0) for one in some]
    dense_kernels.normalise[config.grid](
        some[0], strides[0], some[1], strides[1], weight, sums, out, d, eps,
        ROUNDED=rounded, OVERLAP=overlap, **config.options(launch.hardware(x.device)),
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """Return x `[..., d]` as rows `[n, d]`, entries of a row side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@launch.on_its_device
def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of one token `[1, heads, 1, size]`; see `ops.dense`."""
    reference.check_attention(q, keys, values, mask)
    if not _attends(q, keys, values):
        return reference.attend_one(q, keys, values, mask, scale)
    return _attention(q, keys, values, mask, scale, None, None, True)


@launch.on_its_device
def attend_next(
    q: Tensor, key: Tensor, value: Tensor, rotation: list[Tensor], keys: Tensor, values: Tensor, at: list[Tensor],
    mask: Tensor | None, scale: float, overlap: bool = True,
) -> Tensor:  # fmt: skip
    """Keep a token's key and value, and return its attention `[1, heads, 1, size]`; see `ops.dense`."""
    reference.check_attention(q, keys, values, mask)
    reference.check_next(keys, key, value, rotation, at)
    if not _attends(q, keys, values, key, value):
        return reference.attend_next(q, key, value, rotation, keys, values, at, mask, scale)
    places = at if len(at) == 2 else [*at, torch.zeros_like(at[0])]
    new = (key, value, key.stride(1), value.stride(1), *places)
    return _attention(q, keys, values, mask, scale, new, tuple(one.contiguous() for one in rotation) or None, overlap)


def _attends(q: Tensor, *others: Tensor) -> bool:
    """Return whether there is a kernel for heads like these."""
    return all(one.stride(3) == 1 for one in (q, *others)) and q.shape[3] % 2 == 0 and not _is_for_reference(q)


def _attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float,
    new: tuple[Any, ...] | None, rotation: tuple[Tensor, ...] | None, overlap: bool,
) -> Tensor:  # fmt: skip
    _, heads, _, size = q.shape
    _, groups, length, _ = keys.shape
    queries = heads // groups
    found = launch.hardware(q.device)
    config = launch.attention(length, queries, size)
    blocks, width = config.grid[0], config.constants["R"]
    largest, total = q.new_empty((2, groups, blocks, width), dtype=torch.float32)
    partial = q.new_empty((groups, blocks, width, size), dtype=torch.float32)
    y = q.new_empty((1, heads, 1, size))
    dense_kernels.attend_block[groups, blocks](
        q, keys, values, new, rotation, None if mask is None else mask.contiguous(), largest, total, partial, scale,
        length, size // 2, q.stride(1), keys.stride(1), keys.stride(2), values.stride(1), values.stride(2),
        QUERIES=queries, **config.options(found),
    )  # fmt: skip
    last = launch.combination(blocks, config)
    dense_kernels.attend_all[(heads,)](
        largest, total, partial, y, blocks, size, QUERIES=queries, OVERLAP=overlap, **last.options(found)
    )
    return y


@launch.on_its_device
def angles_one(position: Tensor, frequencies: Tensor, scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines; see `ops.dense`."""
    reference.check_angles(position, frequencies)
    if _is_for_reference(like):
        return reference.angles_one(position, frequencies, scale, like)
    n = len(frequencies)
    cos, sin = like.new_empty((2, 2 * n))
    config = launch.angles(n)
    dense_kernels.angles_one[config.grid](
        position, frequencies.contiguous(), cos, sin, n, scale, **config.options(launch.hardware(position.device))
    )
    return cos, sin


@launch.on_its_device
def largest_one(logits: Tensor) -> Tensor:
    """Return the place of the largest `[1, 1]`; see `ops.dense`."""
    reference.check_logits(logits)
    if _is_for_reference(logits):
        return reference.largest_one(logits)
    found, n = launch.hardware(logits.device), logits.shape[1]
    config = launch.largest(n)
    ranks, places = logits.new_empty((2, *config.grid), dtype=torch.int32)
    dense_kernels.largest_of_block[config.grid](logits.contiguous(), ranks, places, n, **config.options(found))
    y = logits.new_empty((1, 1), dtype=torch.int64)
    last = launch.largest_of_all(len(ranks))
    dense_kernels.largest_of_all[last.grid](ranks, places, y, len(ranks), n, **last.options(found))
    return y


# By name, for the backend.
OPS = {
    op.__name__: op
    for op in (project, gated, normalise, add_and_normalise, attend_one, attend_next, angles_one, largest_one)
}


def _is_for_reference(x: Tensor) -> bool:
    return x.dtype not in Gathering.dtypes or requested() == "reference"


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias.contiguous()


def three(values: Sequence[T]) -> tuple[T, ...]:
    """Pad to three by what is not looked at: of kernels that compute one to three linears."""
    return (*values, *[values[0]] * (3 - len(values)))
