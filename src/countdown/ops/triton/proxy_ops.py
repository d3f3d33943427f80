"""Deciding by a 4-bit proxy on a device that Triton compiles for: workspaces and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from countdown.ops.proxy_format import group_of, padded
from countdown.ops.triton import launch, proxy_kernels

Token = tuple[Tensor, Tensor, Tensor]


def select(
    x: Tensor,
    proxy: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    active: Tensor,
    counters: Tensor | None,
    activation: str,
) -> None:
    """Fill active `[T, h]`, bool, for x `[T, d]`, and count where there are counters.

    Args:
        x, proxy, biases, per_neuron, counters, activation: See `schema`; a proxy of 4 bits.
    """
    h = len(per_neuron)
    found = launch.hardware(x.device)
    config = launch.proxy_selection(x.shape[1], h, len(x), found)
    kernel = proxy_kernels.select_by_proxy
    kernel[config.grid](
        *_tokens(x, found), *words(proxy), *launch.given(biases[0], biases[1], x), per_neuron, active.view(torch.int8),
        active if counters is None else counters, len(x), h,
        ACT=activation, BIAS=launch.has(biases), COUNT=counters is not None, **config.options(found),
    )  # fmt: skip


def partial_sums(
    x: Tensor,
    weights: list[Tensor],
    proxy: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    counters: Tensor,
    expected: int,
    activation: str,
) -> Tensor:
    """Return Σ over active neurons by program, float32 `[P, 1, d]`, for one token x `[1, d]`.

    Args:
        x, weights, proxy, biases, per_neuron, counters, activation: See `schema`; a proxy of 4 bits.
        expected: About how many neurons are active.
    """
    gate, up, down = weights
    h, d = gate.shape
    found = launch.hardware(x.device)
    config = launch.proxy_decision(d, h, x.element_size(), expected, found)
    partial = x.new_empty((*config.grid, 1, d), dtype=torch.float32)
    proxy_kernels.decide_by_proxy_and_sum[config.grid](
        x, gate, up, down, *launch.given(biases[0], biases[1], x), *words(proxy),
        per_neuron, partial, counters,
        h, gate.stride(0), up.stride(0), down.stride(1), d,
        ACT=activation, BIAS=launch.has(biases), **config.options(found),
    )  # fmt: skip
    return partial


def _tokens(x: Tensor, found: launch.Hardware) -> Token:
    """Return the tokens in 8 bits as `quantise_tokens` leaves them."""
    tokens, d = x.shape
    width = padded(d, 4)
    config = launch.quantisation(d, tokens, found)
    words = x.new_empty((tokens, 2, width // 8), dtype=torch.int32)
    sums = x.new_empty((tokens, width // group_of(d, 4)), dtype=torch.float32)
    steps = x.new_empty(tokens, dtype=torch.float32)
    proxy_kernels.quantise_tokens[config.grid](x, words, sums, steps, d, x.stride(0), **config.options(found))
    return words, sums, steps


def words(proxy: list[Tensor]) -> list[Any]:
    """Return levels, as words, and scales of gate and of up."""
    return [proxy[0].view(torch.int32), proxy[1], proxy[2].view(torch.int32), proxy[3]]
