"""The ops of `ops.schema` on a CPU: checks, and calls of the library."""

from __future__ import annotations

import torch
from torch import Tensor

from countdown.errors import ConfigError
from countdown.ops import reference
from countdown.ops.cpu.library import ACTIVATIONS, DECIDERS, DTYPES, FFNCall, library
from countdown.ops.gathering import dense, proxy_bits, refuses_decision, refuses_ffn, too_many
from countdown.ops.proxy_tiles import in_tiles
from countdown.ops.request import VARIABLE, requested
from countdown.ops.schema import check_active, check_counters, check_decision, check_ffn, check_proxy


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
    reason = refuses_decision(decision, indicator, proxy_bits(x, proxy), "cpu") or refuses_ffn(weights, activation)
    if reason and requested() == "cpu":
        raise ConfigError(f"{VARIABLE} is 'cpu', which cannot compute this FFN: {reason}.")
    if reason or too_many(x.shape[:-1].numel()):
        return reference.sparse_ffn(
            x, weights, biases, per_neuron, counters,
            proxy=proxy, decision=decision, drop=drop, indicator=indicator, activation=activation,
            weight_format=weight_format,
        )  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(x, weights, biases, activation, indicator, thresholds=per_neuron, proxy=proxy, counters=counters, y=y)
    return y


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
    reason = refuses_decision(decision, indicator, proxy_bits(x, proxy), "cpu") or refuses_ffn(weights, activation)
    if reason or too_many(x.shape[:-1].numel()):
        return reference.select(
            x, weights, biases, per_neuron,
            proxy=proxy, decision=decision, drop=drop, indicator=indicator, activation=activation,
            weight_format=weight_format,
        )  # fmt: skip
    active = torch.empty((*x.shape[:-1], weights[0].shape[0]), dtype=torch.bool, device="cpu")
    _run(x, weights, biases, activation, indicator, thresholds=per_neuron, proxy=proxy, selected=active)
    return active


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
    if too_many(x.shape[:-1].numel()) or refuses_ffn(weights, activation):
        return reference.given_ffn(x, weights, biases, active, activation=activation, weight_format=weight_format)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(x, weights, biases, activation, "given", given=active.contiguous(), y=y)
    return y


def _run(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activation: str,
    decider: str,
    *,
    thresholds: Tensor | None = None,
    proxy: list[Tensor] | None = None,
    given: Tensor | None = None,
    selected: Tensor | None = None,
    counters: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Compute `y`, or the active sets alone into `selected`."""
    gate, up, down = weights
    h, d = gate.shape
    x, thresholds, biases = x.contiguous(), None if thresholds is None else thresholds.contiguous(), dense(biases)
    parts = dense(in_tiles(proxy)) if proxy else [None] * 4
    words, groups = (0, 0) if parts[0] is None or parts[1] is None else (parts[0].shape[1], parts[1].shape[1])
    library().run(
        FFNCall(
            DTYPES[x.dtype], ACTIVATIONS[activation], DECIDERS[decider], x.numel() // d, d, h, x.data_ptr(),
            gate.data_ptr(), up.data_ptr(), down.data_ptr(), gate.stride()[0], up.stride()[0], down.stride()[1],
            *map(_address, (*biases, thresholds, parts[0], parts[2], parts[1], parts[3])), words, groups,
            *map(_address, (given, selected, counters, y)),
        ),
        [x, *weights, *biases, thresholds, *parts, given, selected, counters, y],
        weights=h * d,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
