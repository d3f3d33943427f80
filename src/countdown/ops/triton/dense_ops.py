"""The dense ops of decode loops on a device that Triton compiles for; see `ops.dense`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from countdown.ops import dense as reference
from countdown.ops.base import Gathering
from countdown.ops.dense import check_attention, check_projections
from countdown.ops.request import requested
from countdown.ops.triton import dense_kernels, launch

T = TypeVar("T")


@launch.on_its_device
def project_one(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """Return the products of one token `[1, Σ d_out]`; see `ops.dense`. At the bandwidth limit."""
    check_projections(x, weights, biases)
    if x.stride(1) != 1 or not all(w.is_contiguous() for w in weights) or _is_for_reference(x):
        return reference.project_one(x, weights, biases)
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
def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of one token `[1, heads, 1, size]`; see `ops.dense`."""
    check_attention(q, keys, values, mask)
    if q.stride(3) != 1 or keys.stride(3) != 1 or values.stride(3) != 1 or _is_for_reference(q):
        return reference.attend_one(q, keys, values, mask, scale)
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
        q, keys, values, q if mask is None else mask.contiguous(), largest, total, partial, scale,
        length, size, q.stride(1), keys.stride(1), keys.stride(2), values.stride(1), values.stride(2),
        QUERIES=queries, MASK=mask is not None, **config.options(found),
    )  # fmt: skip
    last = launch.combination(blocks, config)
    dense_kernels.attend_all[(heads,)](largest, total, partial, y, blocks, size, QUERIES=queries, **last.options(found))
    return y


def _is_for_reference(x: Tensor) -> bool:
    return x.dtype not in Gathering.dtypes or requested() == "reference"


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias.contiguous()


def three(values: Sequence[T]) -> tuple[T, ...]:
    """Pad to three by what is not looked at: of kernels that compute one to three linears."""
    return (*values, *[values[0]] * (3 - len(values)))
