"""The ops in plain PyTorch: the truth that every backend is tested against, and the path where none applies.

It computes every term and masks, so it is as exact as the dense module and no faster. With nothing dropped it gives
the dense module's bits, because it rounds where that rounds.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from countdown.ops.call import Call
from countdown.phase import GENERATED, PADDING, PROMPT
from countdown.sums._base import product_of

# Adding up is reading and writing, and other threads may run the same module.
_COUNTING = threading.Lock()


def drop_smallest(scores: Tensor, drop: int) -> Tensor:
    """Return which scores remain when, in each row, the `drop` smallest go, ties by lower index first.

    Args:
        scores: Float `[..., terms]`. NaN counts as larger than every number.
        drop: 0 ≤ drop ≤ terms.

    Returns:
        Bool `[..., terms]`. Every NaN remains; a row with fewer than `drop` numbers remains whole.
    """
    if drop == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    largest_dropped = scores.kthvalue(drop, dim=-1, keepdim=True).values
    below = scores < largest_dropped
    tied = scores == largest_dropped
    ties_to_drop = drop - below.sum(dim=-1, keepdim=True)
    return ~(below | (tied & (tied.cumsum(dim=-1) <= ties_to_drop)))


def run(call: Call) -> Tensor:
    """Return the result of a checked call; see `ops.call`."""
    factors = call.sum.project(call.x)
    looks = [_phased(call, active) for active in _looks(call, factors)]
    active = looks[-1]
    if call.op == "select":
        return active
    if call.counters is not None:
        _count(call, looks)
    y = call.sum.combine(torch.where(active, product_of(factors), 0))
    if call.compensation is None:
        return y
    return y + call.compensation.added(call.x, _dropped(call, active), _sparse(call), call.added)


def dense(call: Call) -> Tensor:
    """Return the result of a checked call with every term active, which is counted nowhere."""
    return call.sum.combine(product_of(call.sum.project(call.x)))


def _dropped(call: Call, active: Tensor) -> Tensor:
    """Return which terms of each token are to be compensated for: of padding nothing is computed."""
    return ~active if call.phases is None else ~active & (call.phases.view(*call.x.shape[:-1], 1) != PADDING)


def _sparse(call: Call) -> Tensor:
    """Return which tokens are computed sparse, bool `[..., 1]`."""
    finite = call.x.isfinite().all(dim=-1, keepdim=True)
    return finite if call.phases is None else finite & (call.phases.view(finite.shape) == GENERATED)


def _looks(call: Call, factors: tuple[Tensor, ...]) -> list[Tensor]:
    """Return what each look leaves of each token, bool `[..., terms]`, all of them generated; last the active set."""
    if call.op == "given":
        assert call.active is not None
        return [call.active]
    # An input that is not finite says nothing about which terms matter: that token is dense.
    whole = ~call.x.isfinite().all(dim=-1, keepdim=True)
    left = _decided(call, factors) | whole
    if call.second is None:
        return [left]
    return [left, left & (whole | ~(size_of(factors) <= call.second))]


def size_of(factors: Sequence[Tensor]) -> Tensor:
    """Return the size of coefficients as a second look sees it, float32 `[..., terms]`, from their factors."""
    return product_of([factor.float() for factor in factors]).abs()


def _decided(call: Call, factors: tuple[Tensor, ...]) -> Tensor:
    """Return what the first look leaves of tokens that are finite."""
    assert call.selector is not None
    value = call.selector.score(call.sum, call.x, call.parts, factors)
    return ~(value <= call.first) if call.rule == "threshold" else drop_smallest(value * call.first, call.drop)


def _phased(call: Call, active: Tensor) -> Tensor:
    """Return active sets with those of prompts whole and those of padding empty."""
    if call.phases is None:
        return active
    phases = call.phases.view(*call.x.shape[:-1], 1)
    return (active | (phases == PROMPT)) & (phases != PADDING)


def _count(call: Call, looks: Sequence[Tensor]) -> None:
    assert call.counters is not None
    tokens: int | Tensor = call.tokens
    if call.phases is not None:
        generated = call.phases.view(call.x.shape[:-1]) == GENERATED
        tokens, looks = generated.sum(), [left & generated[..., None] for left in looks]
    with _COUNTING:
        call.counters[0] += tokens
        for place, left in enumerate(looks, start=1):
            call.counters[place] += left.sum()
