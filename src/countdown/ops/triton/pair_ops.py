"""Two tokens on a device that Triton compiles for: workspaces and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from countdown.ops.triton import launch, pair_kernels, proxy_ops


def partial_sums(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor | None,
    active: Tensor | None,
    counters: Tensor | None,
    *,
    gate_first: bool,
    activation: str,
    config: launch.Launch,
) -> Tensor:
    """Return Σ over active neurons by program and token, float32 `[P, 2, d]`.

    Args:
        x: `[2, d]`.
        weights, biases, activation: See `schema`; W_down laid out by neuron.
        per_neuron, counters: See `schema`; None where the active sets are given.
        active: Bool `[2, h]`, contiguous; None where thresholds decide.
        gate_first: Whether the gate decides, not up.
        config: Of `launch.pair`.
    """
    order = (0, 1) if gate_first else (1, 0)
    first, other = (weights[place] for place in order)
    first_bias, other_bias = (biases[place] for place in order)
    h, d = first.shape
    partial = x.new_empty((*config.grid, 2, d), dtype=torch.float32)
    needs = x.new_empty((h, 2), dtype=torch.int8)
    known = needs if active is not None else x.new_empty((h, 2))
    # An argument that is None is never touched; some pointer must stand for it.
    pair_kernels.decide_and_sum_pair[config.grid](
        x, first, other, weights[2], *launch.given(first_bias, other_bias, x), x if per_neuron is None else per_neuron,
        needs if active is None else active.view(torch.int8), needs, known, partial,
        needs if counters is None else counters,
        h, x.stride(0), first.stride(0), other.stride(0), weights[2].stride(1), d,
        GIVEN=active is not None, GATE_FIRST=gate_first, ACT=activation, BIAS=launch.has(biases),
        **config.options(launch.hardware(x.device)),
    )  # fmt: skip
    return partial


def partial_sums_by_proxy(
    x: Tensor,
    weights: list[Tensor],
    proxy: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    counters: Tensor,
    *,
    activation: str,
    config: launch.Launch,
) -> Tensor:
    """Return Σ over the neurons that a proxy of 4 bits finds active; see `partial_sums`."""
    gate, up, down = weights
    h, d = gate.shape
    found = launch.hardware(x.device)
    partial = x.new_empty((*config.grid, 2, d), dtype=torch.float32)
    needs = x.new_empty((h, 2), dtype=torch.int8)
    pair_kernels.decide_by_proxy_and_sum_pair[config.grid](
        x, gate, up, down, *launch.given(biases[0], biases[1], x), *proxy_ops.words(proxy), per_neuron, needs, partial,
        counters, h, x.stride(0), gate.stride(0), up.stride(0), down.stride(1), d,
        ACT=activation, BIAS=launch.has(biases), **config.options(found),
    )  # fmt: skip
    return partial
