"""Kernels of the sparse FFN for two tokens. Letters as in `ops.schema`.

As `kernels.decide_and_sum` and `proxy_kernels.decide_by_proxy_and_sum`, with both tokens in registers: a row is read
once and used for both. The neurons that either needs are gathered; which of the two needs one, and what is known of its
coefficients already, waits in `needs` and `known` [h, 2], of which a program touches only its own rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.kernel_parts import (
    activate,
    begin,
    count,
    is_above,
    is_inside,
    keep_active,
    load_bias,
    load_rows,
    pick,
    rounded,
)
from countdown.ops.triton.proxy_kernels import coefficient, load_proxy, quantised


@triton.jit
def _load_pair(x, x_stride, c, inside):
    x0 = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(x + x_stride + c, mask=inside, other=0.0).to(tl.float32)
    return x0, x1


@triton.jit
def _dots(w, xs):
    """Rows of w times both tokens, float32 [rows, 2]: together, as a sum across warps waits for all of them."""
    return tl.sum(tl.join(w * xs[0][None, :], w * xs[1][None, :]), 1)


@triton.jit
def _keep(index, n, total, i, here, active, needs, place, k):
    """Notes which token needs which of rows i, and appends those that either needs to a list in registers."""
    active = here[:, None] & active
    tl.store(needs + place, active.to(tl.int8), mask=here[:, None])
    how_many = tl.sum(active.to(tl.int32), 1)
    index, n, _ = keep_active(index, n, i, how_many > 0, k)
    return index, n, total + tl.sum(how_many, 0)


@triton.jit
def _gather_and_sum(
    xs, first, other, down, first_bias, other_bias, needs, known, partial, index, k, n, p, two,
    first_stride, other_stride, down_stride, c, inside, d: tl.constexpr,
    KNOWN: tl.constexpr, GATE_FIRST: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, GATHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ over the first n neurons of a list in registers for both tokens → partial [P, 2, d] float32.

    KNOWN: what `first` gives is in `known`; else it is computed, and `first` is up.
    """
    tl.debug_barrier()  # what threads of this program wrote into `needs` and `known` is read by others
    y0 = tl.zeros([D], tl.float32)
    y1 = tl.zeros([D], tl.float32)
    for start in tl.range(0, n, GATHER, num_stages=STAGES):
        o = start + tl.arange(0, GATHER)
        here = o < n
        i = pick(index, k, o)
        mask = here[:, None] & inside[None, :]
        place = i[:, None] * 2 + two[None, :]
        w = load_rows(other, i, other_stride, c, mask)
        column = load_rows(down, i, down_stride, c, mask)
        z = _dots(w, xs) + load_bias(other_bias, i, here, BIAS)[:, None]
        if KNOWN:
            v = tl.load(known + place, mask=here[:, None], other=0.0).to(tl.float32)
        else:
            v = _dots(load_rows(first, i, first_stride, c, mask), xs) + load_bias(first_bias, i, here, BIAS)[:, None]
        if not GATE_FIRST:
            z = activate(z, ACT)
        needed = here[:, None] & (tl.load(needs + place, mask=here[:, None], other=0) != 0)
        s0, s1 = tl.split(tl.where(needed, z * v, 0.0))
        y0 += tl.sum(column * s0[:, None], 0)
        y1 += tl.sum(column * s1[:, None], 0)
    tl.store(partial + p * 2 * d + c, y0, mask=inside, eviction_policy="evict_last")
    tl.store(partial + (p * 2 + 1) * d + c, y1, mask=inside, eviction_policy="evict_last")


@triton.jit
def decide_and_sum_pair(
    x, first, other, down, first_bias, other_bias, per_neuron, active_set, needs, known, partial, counters,
    h, x_stride, first_stride, other_stride, down_stride, d: tl.constexpr,
    GIVEN: tl.constexpr, GATE_FIRST: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr, MINE: tl.constexpr,
    STAGES: tl.constexpr, GATHER_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Σ over the neurons of this program's rows that are active, for each of two tokens.

    x [2, d] → partial [P, 2, d] float32. GIVEN: active_set [2, h] int8 says which are active; else `first` and the
    thresholds do, and counters += (2, active neurons).
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, D)
    inside = is_inside(c, d, D)
    k = tl.arange(0, MINE)
    two = tl.arange(0, 2)
    begin(PDL)
    xs = _load_pair(x, x_stride, c, inside)
    index = tl.zeros([MINE], tl.int32)
    n = 0
    total = 0
    for start in tl.range(p * ROWS, h, programs * ROWS, num_stages=STAGES):
        i = start + tl.arange(0, ROWS)
        here = i < h
        place = i[:, None] * 2 + two[None, :]
        if GIVEN:
            active = tl.load(active_set + two[None, :] * h + i[:, None], mask=here[:, None], other=0) != 0
        else:
            w = load_rows(first, i, first_stride, c, here[:, None] & inside[None, :])
            z = _dots(w, xs) + load_bias(first_bias, i, here, BIAS)[:, None]
            v = rounded(z, x)
            if GATE_FIRST:
                v = rounded(activate(v, ACT), x)
            tl.store(known + place, v.to(known.dtype.element_ty), mask=here[:, None])
            threshold = tl.load(per_neuron + i, mask=here, other=0.0)
            # Of an input that is not finite, no projection z is: every neuron is active then.
            active = is_above(v, threshold[:, None]) | ~(tl.abs(z) < float("inf"))
        index, n, total = _keep(index, n, total, i, here, active, needs, place, k)
    if not GIVEN:
        count(counters, p == 0, tl.full([], 2, tl.int64), total)
    _gather_and_sum(
        xs, first, other, down, first_bias, other_bias, needs, known, partial, index, k, n, p, two,
        first_stride, other_stride, down_stride, c, inside, d, not GIVEN, GATE_FIRST, ACT, BIAS, D, GATHER,
        GATHER_STAGES,
    )  # fmt: skip


@triton.jit
def decide_by_proxy_and_sum_pair(
    x, gate, up, down, gate_bias, up_bias, gate_levels, gate_scales, up_levels, up_scales,
    per_neuron, needs, partial, counters,
    h, x_stride, gate_stride, up_stride, down_stride, d: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, WORDS: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
    DOT4: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr, MINE: tl.constexpr,
    STAGES: tl.constexpr, GATHER_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `decide_and_sum_pair`, decided by the proxy."""
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, D)
    inside = is_inside(c, d, D)
    k = tl.arange(0, MINE)
    two = tl.arange(0, 2)
    word = tl.arange(0, W)
    begin(PDL)
    token0 = quantised(x, d, W, GROUP, DOT4)
    token1 = quantised(x + x_stride, d, W, GROUP, DOT4)
    index = tl.zeros([MINE], tl.int32)
    n = 0
    total = 0
    for start in tl.range(p * ROWS, h, programs * ROWS, num_stages=STAGES):
        i = start + tl.arange(0, ROWS)
        here = i < h
        gb = load_bias(gate_bias, i, here, BIAS)
        ub = load_bias(up_bias, i, here, BIAS)
        gate_rows = load_proxy(gate_levels, gate_scales, i, here, word, WORDS, W, GROUP)
        up_rows = load_proxy(up_levels, up_scales, i, here, word, WORDS, W, GROUP)
        s0 = coefficient(gate_rows, up_rows, gb, ub, token0, ACT, W, GROUP, DOT4)
        s1 = coefficient(gate_rows, up_rows, gb, ub, token1, ACT, W, GROUP, DOT4)
        threshold = tl.load(per_neuron + i, mask=here, other=0.0)
        active = is_above(tl.join(s0, s1), threshold[:, None])
        index, n, total = _keep(index, n, total, i, here, active, needs, i[:, None] * 2 + two[None, :], k)
    count(counters, p == 0, tl.full([], 2, tl.int64), total)
    xs = _load_pair(x, x_stride, c, inside)
    _gather_and_sum(
        xs, up, gate, down, up_bias, gate_bias, needs, needs, partial, index, k, n, p, two,
        up_stride, gate_stride, down_stride, c, inside, d, False, False, ACT, BIAS, D, GATHER, GATHER_STAGES,
    )  # fmt: skip
