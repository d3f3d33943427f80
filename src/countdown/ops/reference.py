"""The ops in plain PyTorch: the truth that every backend is tested against, and the path where none applies.

It computes every neuron and masks, so it is as exact as the dense FFN and no faster. With nothing dropped it
gives the dense FFN's bits, because it rounds where the dense FFN rounds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.ops.activations import ACTIVATIONS
from countdown.ops.indicators import get_indicator
from countdown.ops.proxy import factors as proxy_factors
from countdown.ops.proxy_tiles import in_rows
from countdown.ops.schema import (
    LIBRARY,
    check_active,
    check_attention,
    check_counters,
    check_decision,
    check_ffn,
    check_linear,
    check_projections,
    check_proxy,
)


def drop_smallest(scores: Tensor, drop: int) -> Tensor:
    """Return which scores remain when, in each row, the `drop` smallest go, ties by lower index first.

    Args:
        scores: Float `[..., h]`. NaN counts as larger than every number.
        drop: 0 ≤ drop ≤ h.

    Returns:
        Bool `[..., h]`. Every NaN remains; a row with fewer than `drop` numbers remains whole.
    """
    if drop == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    largest_dropped = scores.kthvalue(drop, dim=-1, keepdim=True).values
    below = scores < largest_dropped
    tied = scores == largest_dropped
    ties_to_drop = drop - below.sum(dim=-1, keepdim=True)
    return ~(below | (tied & (tied.cumsum(dim=-1) <= ties_to_drop)))


def _project(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str) -> tuple[Tensor, Tensor]:
    a = ACTIVATIONS[activation](F.linear(x, weights[0], biases[0]))
    return a, F.linear(x, weights[1], biases[1])


def _project_by(
    proxy: list[Tensor], x: Tensor, biases: list[Tensor | None], activation: str, h: int
) -> tuple[Tensor, Tensor]:
    return proxy_factors(x, in_rows(proxy, h), biases, ACTIVATIONS[activation])


def _decide(
    x: Tensor, factors: tuple[Tensor, ...], per_term: Tensor, decision: str, drop: int, indicator: str
) -> Tensor:
    value = get_indicator(indicator).formula(*(factor.float() for factor in factors))
    active = ~(value <= per_term) if decision == "threshold" else drop_smallest(value * per_term, drop)
    # An input that is not finite says nothing about which terms matter: that token is dense.
    return active | ~x.isfinite().all(dim=-1, keepdim=True)


def _count(counters: Tensor, active: Tensor) -> None:
    counters[0] += active[..., 0].numel()
    counters[1] += active.sum()


def _combine(a: Tensor, u: Tensor, active: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    return F.linear(torch.where(active, a * u, 0), weights[2], biases[2])


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
    """Return y = W_down (mask ⊙ act(W_gate x) ⊙ W_up x), the mask decided for each token. See `schema`."""
    check_ffn(x, weights, biases, activation, weight_format)
    check_proxy(x, weights, proxy, indicator)
    check_decision(weights[0].shape[0], per_neuron, decision, drop, indicator)
    check_counters(counters)
    a, u = _project(x, weights, biases, activation)
    seen = (a, u) if proxy is None else _project_by(proxy, x, biases, activation, h=len(per_neuron))
    active = _decide(x, seen, per_neuron, decision, drop, indicator)
    _count(counters, active)
    return _combine(a, u, active, weights, biases)


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
    """Return the active set of each token. See `schema`."""
    check_ffn(x, weights, biases, activation, weight_format)
    check_proxy(x, weights, proxy, indicator)
    check_decision(weights[0].shape[0], per_neuron, decision, drop, indicator)
    if proxy is None:
        seen = _project(x, weights, biases, activation)
    else:
        seen = _project_by(proxy, x, biases, activation, h=len(per_neuron))
    return _decide(x, seen, per_neuron, decision, drop, indicator)


def given_ffn(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    active: Tensor,
    *,
    activation: str,
    weight_format: str = "plain",
) -> Tensor:
    """Return y with the active set of each token given. See `schema`."""
    check_ffn(x, weights, biases, activation, weight_format)
    check_active(x, weights, active)
    a, u = _project(x, weights, biases, activation)
    return _combine(a, u, active, weights, biases)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    per_channel: Tensor,
    counters: Tensor,
    *,
    decision: str,
    drop: int,
    indicator: str,
    weight_format: str = "plain",
) -> Tensor:
    """Return z = W (mask ⊙ x), the mask decided for each token. See `schema`."""
    check_linear(x, weight, bias, weight_format)
    check_decision(x.shape[-1], per_channel, decision, drop, indicator)
    check_counters(counters)
    active = _decide(x, (x,), per_channel, decision, drop, indicator)
    _count(counters, active)
    return F.linear(torch.where(active, x, 0), weight, bias)


def project_one(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """Return one token through several linears, `[1, Σ d_out]`. See `schema`."""
    check_projections(x, weights, biases)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=-1)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of one token, `[1, heads, 1, size]`. See `schema`."""
    check_attention(q, keys, values, mask)
    _, heads, _, size = q.shape
    grouped = q.reshape(1, keys.shape[1], -1, size)
    scores = (grouped @ keys.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1).to(q.dtype) @ values).view(1, heads, 1, size)


for _op in (sparse_ffn, select, given_ffn, sparse_linear, project_one, attend_one):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
