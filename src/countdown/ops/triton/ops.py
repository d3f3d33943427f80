"""The ops of `ops.schema` on a device that Triton compiles for: checks, workspaces, launches."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from countdown.errors import ConfigError
from countdown.ops import reference
from countdown.ops.gathering import dense, flat, proxy_bits, refuses_decision, refuses_ffn, too_many
from countdown.ops.indicators import GATE
from countdown.ops.proxy_tiles import in_rows
from countdown.ops.request import VARIABLE, requested
from countdown.ops.schema import check_active, check_counters, check_decision, check_ffn, check_proxy
from countdown.ops.triton import kernels, launch, pair_ops, proxy_ops

V = TypeVar("V")


@launch.on_its_device
def sparse_ffn(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    counters: Tensor,
    *,
    proxy: list[Tensor] | None = None,
    decision: str,
    drop: int,
    indicator: str,
    activation: str,
    weight_format: str = "plain",
) -> Tensor:
    """Return y `[..., d]`; see `schema`. What has no kernel, and more than `MOST_TOKENS` tokens, is masked dense."""
    check_ffn(x, weights, biases, activation, weight_format)
    check_proxy(x, weights, proxy, indicator)
    check_decision(weights[0].shape[0], per_neuron, decision, drop, indicator)
    check_counters(counters)
    tokens = x.shape[:-1].numel()
    reason = refuses_decision(decision, indicator, proxy_bits(x, proxy), "triton") or refuses_ffn(weights, activation)
    if reason and requested() == "triton":
        raise ConfigError(f"{VARIABLE} is 'triton', which cannot compute this FFN: {reason}.")
    if reason or too_many(tokens):
        return reference.sparse_ffn(
            x, weights, biases, per_neuron, counters,
            proxy=proxy, decision=decision, drop=drop, indicator=indicator, activation=activation,
            weight_format=weight_format,
        )  # fmt: skip
    rows, biases, per_neuron = flat(x), dense(biases), per_neuron.contiguous()
    if proxy is not None:
        proxy = in_rows(proxy, len(per_neuron))
        y = _decide_by_proxy(rows, weights, biases, proxy, per_neuron, counters, activation, drop)
    elif tokens == 1:
        y = _decide_one(rows, weights, biases, per_neuron, counters, indicator == GATE.name, activation, drop)
    else:
        y = _decide_many(rows, weights, biases, per_neuron, counters, indicator == GATE.name, activation, drop)
    return y.view(x.shape)


@launch.on_its_device
def select(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    *,
    proxy: list[Tensor] | None = None,
    decision: str,
    drop: int,
    indicator: str,
    activation: str,
    weight_format: str = "plain",
) -> Tensor:
    """Return the active set of each token `[..., h]`; see `schema`."""
    check_ffn(x, weights, biases, activation, weight_format)
    check_proxy(x, weights, proxy, indicator)
    check_decision(weights[0].shape[0], per_neuron, decision, drop, indicator)
    tokens, h = x.shape[:-1].numel(), weights[0].shape[0]
    reason = refuses_decision(decision, indicator, proxy_bits(x, proxy), "triton") or refuses_ffn(weights, activation)
    if reason or too_many(tokens):
        return reference.select(
            x, weights, biases, per_neuron,
            proxy=proxy, decision=decision, drop=drop, indicator=indicator, activation=activation,
            weight_format=weight_format,
        )  # fmt: skip
    active = torch.empty(*x.shape[:-1], h, dtype=torch.bool, device=x.device)
    thresholds = per_neuron.contiguous()
    biases = dense(biases)
    if proxy is not None:
        proxy_ops.select(flat(x), in_rows(proxy, h), biases, thresholds, active.view(-1, h), None, activation)
    else:
        gate_first = indicator == GATE.name
        _coefficients(flat(x), weights, biases, thresholds, active, None, gate_first, activation, "select")
    return active


@launch.on_its_device
def given_ffn(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    active: Tensor,
    *,
    activation: str,
    weight_format: str = "plain",
) -> Tensor:
    """Return y `[..., d]` with the active sets given; see `schema`."""
    check_ffn(x, weights, biases, activation, weight_format)
    check_active(x, weights, active)
    tokens, h = x.shape[:-1].numel(), weights[0].shape[0]
    if too_many(tokens) or refuses_ffn(weights, activation):
        return reference.given_ffn(x, weights, biases, active, activation=activation, weight_format=weight_format)
    rows, biases = flat(x), dense(biases)
    if tokens == 1:
        indices = torch.empty(h, dtype=torch.int32, device=x.device)
        count = torch.empty(1, dtype=torch.int32, device=x.device)
        options = launch.Launch((1,), {"BLOCK": 1024}, 4).options(launch.hardware(x.device))
        flags = active.contiguous().view(torch.int8)
        kernels.list_active[(1,)](flags, indices, count, h, **options)
        return listed_ffn(rows, weights, biases, indices, count, activation=activation).view(x.shape)
    return _given(rows, weights, biases, active.contiguous().view(tokens, h), activation).view(x.shape)


def listed_ffn(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], indices: Tensor, count: Tensor, *, activation: str
) -> Tensor:
    """Return y `[1, d]` of one token whose active neurons are listed.

    Args:
        x: `[1, d]`.
        weights, biases, activation: See `schema`; W_down laid out by neuron.
        indices: int32 `[h]`, of which the first `count[0]` name different neurons.
        count: int32 `[1]`, on the device.
    """
    gate, up, down = weights
    h, d = gate.shape
    found = launch.hardware(x.device)
    config = launch.listed(d, h, x.element_size(), found)
    partial = x.new_empty((*config.grid, 1, d), dtype=torch.float32)
    kernels.sum_listed[config.grid](
        x, gate, up, down, *launch.given(biases[0], biases[1], x), indices, count, partial,
        h, gate.stride(0), up.stride(0), down.stride(1), d,
        ACT=activation, BIAS=launch.has(biases), **config.options(found),
    )  # fmt: skip
    return _reduce(x, partial, biases[2])


def _decide_one(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    counters: Tensor,
    gate_first: bool,
    activation: str,
    drop: int,
) -> Tensor:
    (first, other), (first_bias, other_bias) = _ordered(weights, gate_first), _ordered(biases, gate_first)
    h, d = first.shape
    found = launch.hardware(x.device)
    config = launch.decide(d, h, x.element_size(), h - drop, found)
    partial = x.new_empty((*config.grid, 1, d), dtype=torch.float32)
    kernels.decide_and_sum[config.grid](
        x, first, other, weights[2], *launch.given(first_bias, other_bias, x), per_neuron, partial, counters,
        h, first.stride(0), other.stride(0), weights[2].stride(1), d,
        GATE_FIRST=gate_first, ACT=activation, BIAS=launch.has(biases), **config.options(found),
    )  # fmt: skip
    return _reduce(x, partial, biases[2])


def _decide_by_proxy(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    proxy: list[Tensor],
    per_neuron: Tensor,
    counters: Tensor,
    activation: str,
    drop: int,
) -> Tensor:
    tokens, h = len(x), len(per_neuron)
    if tokens == 1:
        partial = proxy_ops.partial_sums(x, weights, proxy, biases, per_neuron, counters, h - drop, activation)
        return _reduce(x, partial, biases[2])
    config = launch.pair_by_proxy(x.shape[1], h, x.element_size(), h - drop, launch.hardware(x.device))
    if tokens == 2 and config is not None:
        partial = pair_ops.partial_sums_by_proxy(
            x, weights, proxy, biases, per_neuron, counters, activation=activation, config=config
        )
        return _reduce(x, partial, biases[2])
    active = torch.empty(tokens, h, dtype=torch.bool, device=x.device)
    proxy_ops.select(x, proxy, biases, per_neuron, active, counters, activation)
    return _given(x, weights, biases, active, activation)


def _decide_many(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    counters: Tensor,
    gate_first: bool,
    activation: str,
    drop: int,
) -> Tensor:
    if (config := _pair(x, weights, drop)) is not None:
        partial = pair_ops.partial_sums(
            x, weights, biases, per_neuron, None, counters, gate_first=gate_first, activation=activation, config=config
        )
        return _reduce(x, partial, biases[2])
    found = _coefficients(x, weights, biases, per_neuron, None, counters, gate_first, activation, "decide")
    return _sum_columns(x, *found, weights, biases)


def _given(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], active: Tensor, activation: str) -> Tensor:
    """Return y `[T, d]` of several tokens with their active sets `[T, h]`."""
    if (config := _pair(x, weights, 0, given=True)) is not None:
        partial = pair_ops.partial_sums(
            x, weights, biases, None, active, None, gate_first=False, activation=activation, config=config
        )
        return _reduce(x, partial, biases[2])
    found = _coefficients(x, weights, biases, None, active, None, False, activation, "given")
    return _sum_columns(x, *found, weights, biases)


def _pair(x: Tensor, weights: list[Tensor], drop: int, *, given: bool = False) -> launch.Launch | None:
    """Return the launch for two tokens, None for more, where registers do not hold them, and where tiles are faster."""
    h, d = weights[0].shape
    # With 16 bits tiles are matrix instructions, which win where most rows are read, as for deciding.
    if len(x) != 2 or (x.element_size() == 2 and not given):
        return None
    return launch.pair(d, h, x.element_size(), h - drop, launch.hardware(x.device), given=given)


def _coefficients(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor | None,
    active: Tensor | None,
    counters: Tensor | None,
    gate_first: bool,
    activation: str,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """Return coefficients `[h, TILE_TOKENS]` and which neurons any token needs `[h]`; `select` fills `active` only."""
    (first, other), (first_bias, other_bias) = _ordered(weights, gate_first), _ordered(biases, gate_first)
    h, d = first.shape
    found = launch.hardware(x.device)
    config = launch.tiled(d, h, x.element_size(), found)
    s = x.new_empty((h, launch.TILE_TOKENS))
    needs = x.new_empty(h, dtype=torch.int8)
    # An argument that the mode does not use is never touched; some pointer must stand for it.
    kernels.coefficients[config.grid](
        x, first, other, *launch.given(first_bias, other_bias, x),
        x if per_neuron is None else per_neuron, needs if active is None else active.view(torch.int8),
        s, needs, needs if counters is None else counters,
        len(x), d, h, x.stride(0), first.stride(0), other.stride(0),
        MODE=mode, GATE_FIRST=gate_first, ACT=activation, BIAS=launch.has(biases), **config.options(found),
    )  # fmt: skip
    return s, needs


def _sum_columns(
    x: Tensor,
    s: Tensor,
    needs: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
) -> Tensor:
    h, d = weights[0].shape
    found = launch.hardware(x.device)
    config, each = launch.columns(d, h, x.element_size(), found)
    partial = x.new_empty((config.grid[1], len(x), d), dtype=torch.float32)
    kernels.sum_columns[config.grid](
        s, needs, weights[2], partial, len(x), d, h, weights[2].stride(1), each, **config.options(found)
    )
    return _reduce(x, partial, biases[2])


def _reduce(x: Tensor, partial: Tensor, bias: Tensor | None) -> Tensor:
    """Return y `[tokens, d]` from partial sums `[P, tokens, d]`."""
    programs, tokens, d = partial.shape
    y = x.new_empty((tokens, d))
    config = launch.reduction(d, programs, tokens)
    kernels.reduce[config.grid](
        partial, x if bias is None else bias, y, programs, tokens, d,
        BIAS=bias is not None, **config.options(launch.hardware(x.device)),
    )  # fmt: skip
    return y


def _ordered(pair: list[V], gate_first: bool) -> tuple[V, V]:
    return (pair[0], pair[1]) if gate_first else (pair[1], pair[0])
