"""Sparse linears on a device that Triton compiles for: what kernels are given, workspaces, launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from countdown.ops.base import by_rank, contiguous, flat
from countdown.ops.call import Call
from countdown.ops.triton import launch, linear_kernels, loaders
from countdown.ops.triton.dense_ops import three

# By weight format: how rows of channels are read; see `loaders`.
FORMATS: dict[str, Any] = {"plain": loaders.plain}


@launch.on_its_device
def run(x: Tensor, call: Call) -> Tensor:
    """Return the result of a call; see `Backend.run`.

    Args:
        x: The tokens, for the device.
        call: Of one to `MOST_TOKENS` tokens.
    """
    x = flat(x)
    if call.op == "select":
        return _select(x, call)
    thresholds = None if call.per_term is None else [call.per_term.contiguous()]
    counters = None if call.counters is None or call.op == "given" else [call.counters]
    active = None if call.active is None else call.active.contiguous().view(torch.int8)
    if active is not None and call.counters is not None:
        # The kernel's own programs count by thresholds.
        call.counters[0].add_(len(x))
        call.counters[1].add_(active.sum())
    y = _sum(x, [call], thresholds, active, call.phases, counters)
    return y.view(*call.x.shape[:-1], call.sum.outputs)


@launch.on_its_device
def run_together(x: Tensor, calls: Sequence[Call]) -> Tensor:
    """Return the results of calls of `sparse` on the same x, side by side; see `ops.together`."""
    first = calls[0]
    thresholds = [call.per_term.contiguous() for call in calls]  # type: ignore[union-attr]
    y = _sum(flat(x), calls, thresholds, None, first.phases, [call.counters for call in calls])
    return y.view(*first.x.shape[:-1], -1)


def _select(x: Tensor, call: Call) -> Tensor:
    active, d = call.empty(), x.shape[1]
    assert call.per_term is not None
    config = launch.channel_selection(d, len(x))
    linear_kernels.select_channels[config.grid](
        x, x.stride(0), call.per_term.contiguous(), call.phases, active.view(torch.int8), d,
        **config.options(launch.hardware(x.device)),
    )  # fmt: skip
    return active


def _sum(
    x: Tensor,
    calls: Sequence[Call],
    thresholds: Sequence[Tensor] | None,
    active: Tensor | None,
    phases: Tensor | None,
    counters: Sequence[Tensor | None] | None,
) -> Tensor:
    """Return y `[T, Σ outputs]` of linears whose weights have one format and dtype, and whose biases have one dtype.

    Args:
        x: `[T, d]`, entries of a token side by side.
        calls: One to `MOST_TOGETHER` linears, their weights laid out by channel; all compensated for, or none.
        thresholds: Of each, float32 `[d]`; None where active sets are given.
        active: int8 `[T, d]`: those, of one linear.
        phases, counters: See `ops.call`; of each linear.
    """
    found = launch.hardware(x.device)
    weights = [call.sum.weights[0].parts[0] for call in calls]
    factors = [by_rank(call.added) for call in calls if call.added]
    inner, outer = [b for b, _ in factors], [a for _, a in factors]
    heights, ranks = [call.sum.outputs for call in calls], [len(factor) for factor in inner]
    tokens, d = x.shape
    form = launch.channels(d, heights, ranks, weights[0].element_size(), tokens, found)
    partial_sums = x.new_empty((form.splits, tokens, sum(heights)), dtype=torch.float32)
    low = x.new_empty((form.low_splits, tokens, sum(ranks)), dtype=torch.float32) if ranks else None
    limits, counts = thresholds and three(thresholds), counters and three(counters)
    sizes, low_sizes = (*heights, 0, 0)[:3], (*ranks, 0, 0, 0)[:3]
    linear_kernels.sum_channels[form.launch.grid](
        x, x.stride(0), _apart(weights, 1), _apart(inner, 1), limits, active, phases, counts,
        partial_sums, low, sizes, low_sizes, form.tiles, form.low_tiles, form.low_tiles * form.low_splits, d,
        LOAD=FORMATS[calls[0].sum.weights[0].format], **form.launch.options(found),
    )  # fmt: skip
    y = x.new_empty((tokens, sum(heights)))
    last = launch.finish(d, heights, ranks, form, tokens, counting=counters is not None)
    biases = [contiguous(call.sum.biases)[0] for call in calls]
    there = next((bias for bias in biases if bias is not None), None)
    has_bias, some = there is not None, None
    if there is not None:
        some = [there.new_zeros(size) if b is None else b for size, b in zip(heights, biases, strict=True)]
    linear_kernels.finish[last.grid](
        x, x.stride(0), limits, phases, counts, partial_sums, low, _apart(outer, 0), some and three(some), y,
        sizes, low_sizes, form.splits, form.low_splits, tokens, d, HAS_BIAS=has_bias, **last.options(found),
    )  # fmt: skip
    return y


def _apart(matrices: Sequence[Tensor], dim: int) -> tuple[Tensor | int, ...] | None:
    """Return three matrices and how far their rows, along a dimension, are apart; None for none."""
    return (*three(matrices), *three([one.stride(dim) for one in matrices])) if matrices else None
