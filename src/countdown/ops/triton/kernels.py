"""Kernels of the sparse FFN. Letters as in `ops.schema`: T tokens, d hidden size, h neurons.

One token: a program computes the indicator of its own rows, keeps the active ones in registers and goes straight on to
their rows of the other two matrices: no list of active neurons in memory, no second launch. Several tokens: rows are
read once for all, by tiles, those that no token needs masked out. Either way a program leaves a partial sum of its own
and `reduce` adds them in a fixed order, so the same call gives the same bits.

Rows are W_gate[i], W_up[i] and W_down[:, i], each contiguous. Loads that are used once are marked to leave the cache
first; partial sums are marked to stay in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.kernel_parts import (
    activate,
    begin,
    count,
    dot,
    gather_and_sum,
    is_above,
    is_inside,
    keep_active,
    load_bias,
    load_rows,
    pick,
    rounded,
)


@triton.jit
def _is_active(v, z, threshold):
    # Of an input that is not finite, no projection z is: every neuron is active then.
    return is_above(v, threshold) | ~(tl.abs(z) < float("inf"))


@triton.jit
def decide_and_sum(
    x, first, other, down, first_bias, other_bias, per_neuron, partial, counters,
    h, first_stride, other_stride, down_stride, d: tl.constexpr,
    GATE_FIRST: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr, MINE: tl.constexpr,
    STAGES: tl.constexpr, GATHER_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: Σ over the active neurons of this program's rows.

    x [d] → partial [P, d] float32; counters += (1, active neurons). `first` is the projection that decides, `other`
    the one that is read at active rows. Program p takes blocks of ROWS rows, p, p + P, ...: neighbours read
    neighbouring memory at about the same time. D ≥ d and MINE ≥ its rows are powers of two.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, D)
    inside = is_inside(c, d, D)
    b = tl.arange(0, ROWS)
    k = tl.arange(0, MINE)
    begin(PDL)
    xv = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    index = tl.zeros([MINE], tl.int32)
    value = tl.zeros([MINE], tl.float32)
    n = 0
    for start in tl.range(p * ROWS, h, programs * ROWS, num_stages=STAGES):
        i = start + b
        here = i < h
        w = load_rows(first, i, first_stride, c, here[:, None] & inside[None, :])
        z = tl.sum(w * xv[None, :], 1) + load_bias(first_bias, i, here, BIAS)
        v = rounded(z, x)
        if GATE_FIRST:
            v = rounded(activate(v, ACT), x)
        active = here & _is_active(v, z, tl.load(per_neuron + i, mask=here, other=0.0))
        # At 80% two blocks of five have none, of four rows each.
        if tl.sum(active.to(tl.int32), 0) > 0:
            index, n, to = keep_active(index, n, i, active, k)
            value += tl.sum(tl.where(to, v[:, None], 0.0), 0)

    count(counters, p == 0, tl.full([], 1, tl.int64), n)
    y = tl.zeros([D], tl.float32)
    for start in tl.range(0, n, GATHER, num_stages=GATHER_STAGES):
        o = start + tl.arange(0, GATHER)
        here = o < n
        i = pick(index, k, o)
        mask = here[:, None] & inside[None, :]
        w = load_rows(other, i, other_stride, c, mask)
        column = load_rows(down, i, down_stride, c, mask)
        v = tl.sum(w * xv[None, :], 1) + load_bias(other_bias, i, here, BIAS)
        if not GATE_FIRST:
            v = activate(v, ACT)
        s = tl.where(here, v * pick(value, k, o), 0.0)
        y += tl.sum(column * s[:, None], 0)
    tl.store(partial + p * d + c, y, mask=inside, eviction_policy="evict_last")


@triton.jit
def sum_listed(
    x, gate, up, down, gate_bias, up_bias, listed, listed_count, partial,
    h, gate_stride, up_stride, down_stride, d: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, GATHER: tl.constexpr, MINE: tl.constexpr, GATHER_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: Σ over listed neurons, of which program p takes every P-th.

    x [d], listed [h] int32 of which the first `listed_count[0]` hold → partial [P, d] float32.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, D)
    inside = is_inside(c, d, D)
    k = tl.arange(0, MINE)
    begin(PDL)
    # Not masked by the count, so that both loads are under way at once.
    index = tl.load(listed + p + k * programs, mask=p + k * programs < h, other=0)
    n = (tl.load(listed_count) - p + programs - 1) // programs
    xv = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    y = gather_and_sum(
        xv, gate, up, down, gate_bias, up_bias, index, k, n, gate_stride, up_stride, down_stride, c, inside,
        ACT, BIAS, D, GATHER, GATHER_STAGES,
    )  # fmt: skip
    tl.store(partial + p * d + c, y, mask=inside, eviction_policy="evict_last")


@triton.jit
def list_active(active, listed, listed_count, h, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """active [h] → listed [h] int32, its neurons in order, and listed_count [1]. One program."""
    begin(PDL)
    n = 0
    for start in range(0, h, BLOCK):
        i = start + tl.arange(0, BLOCK)
        one = (tl.load(active + i, mask=i < h, other=0) != 0).to(tl.int32)
        tl.store(listed + n + tl.cumsum(one, 0) - one, i, mask=one != 0)
        n += tl.sum(one, 0)
    tl.store(listed_count, n)


@triton.jit
def _project(x, w, b, i, here, tokens, d, x_stride, stride, BIAS: tl.constexpr, BLOCK: tl.constexpr,
             T: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows i of W x + b for all tokens, float32 [rows, T]."""
    t = tl.arange(0, T)
    acc = tl.zeros([i.shape[0], T], tl.float32)
    for start in tl.range(0, d, BLOCK, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK)
        inside = c < d
        wv = tl.load(
            w + i[:, None].to(tl.int64) * stride + c[None, :],
            mask=here[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first",
        )  # fmt: skip
        xv = tl.load(x + t[:, None] * x_stride + c[None, :], mask=(t < tokens)[:, None] & inside[None, :], other=0.0)
        acc = dot(wv, tl.trans(xv), acc, PRECISION)
    return acc + load_bias(b, i, here, BIAS)[:, None]


@triton.jit
def coefficients(
    x, first, other, first_bias, other_bias, per_neuron, active_set, s, needs, counters,
    tokens, d, h, x_stride, first_stride, other_stride,
    MODE: tl.constexpr, GATE_FIRST: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: coefficients of each token's active neurons, 0 elsewhere, for this program's rows.

    x [tokens, d] → s [h, T] in the dtype of x; needs [h] int8, whether any token needs a neuron. MODE `decide`: `first`
    and the thresholds decide, and counters += (tokens, active neurons). `given`: active_set [tokens, h] int8 does.
    `select`: decide, write active_set, and no more.
    """
    p = tl.program_id(0)
    i = p * ROWS + tl.arange(0, ROWS)
    here = i < h
    t = tl.arange(0, T)
    place = t[None, :] * h + i[:, None]
    valid = here[:, None] & (t < tokens)[None, :]
    begin(PDL)
    if MODE == "given":
        active = tl.load(active_set + place, mask=valid, other=0) != 0
        read = tl.sum(active.to(tl.int32), 1) > 0
    else:
        read = here
    z = _project(x, first, first_bias, i, read, tokens, d, x_stride, first_stride, BIAS, BLOCK, T, STAGES, PRECISION)
    v = rounded(z, x)
    if GATE_FIRST:
        v = rounded(activate(v, ACT), x)
    if MODE != "given":
        threshold = tl.load(per_neuron + i, mask=here, other=0.0)
        active = valid & _is_active(v, z, threshold[:, None])
    if MODE == "select":
        tl.store(active_set + place, active.to(tl.int8), mask=valid)
    else:
        needed = tl.sum(active.to(tl.int32), 1) > 0
        w = _project(
            x, other, other_bias, i, needed, tokens, d, x_stride, other_stride, BIAS, BLOCK, T, STAGES, PRECISION
        )
        if not GATE_FIRST:
            w = activate(rounded(w, x), ACT)
        product = tl.where(active, v * w, 0.0)
        tl.store(s + i[:, None] * T + t[None, :], product.to(s.dtype.element_ty), mask=here[:, None])
        tl.store(needs + i, needed.to(tl.int8), mask=here)
    if MODE == "decide":
        count(counters, p == 0, tokens, tl.sum(tl.sum(active.to(tl.int32), 1), 0))


@triton.jit
def sum_columns(
    s, needs, down, partial, tokens, d, h, down_stride, per_program,
    T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: Σ s_i w_i over this program's neurons and columns.

    s [h, T], needs [h] int8: the neurons that some token needs → partial [P, tokens, d] float32.
    """
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.program_id(1)
    t = tl.arange(0, T)
    y = tl.zeros([T, COLUMNS], tl.float32)
    begin(PDL)
    stop = tl.minimum((p + 1) * per_program, h)
    for start in tl.range(p * per_program, stop, ROWS, num_stages=STAGES):
        i = start + tl.arange(0, ROWS)
        needed = tl.load(needs + i, mask=i < stop, other=0) != 0
        sv = tl.load(s + i[:, None] * T + t[None, :], mask=(i < stop)[:, None], other=0.0)
        wv = tl.load(
            down + i[:, None].to(tl.int64) * down_stride + c[None, :],
            mask=needed[:, None] & (c < d)[None, :], other=0.0, eviction_policy="evict_first",
        )  # fmt: skip
        y = dot(tl.trans(sv), wv, y, PRECISION)
    to = partial + (p * tokens + t[:, None]) * d + c[None, :]
    tl.store(to, y, mask=(t < tokens)[:, None] & (c < d)[None, :], eviction_policy="evict_last")


@triton.jit
def reduce(
    partial, down_bias, y, programs, tokens, d,
    BIAS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial [programs, tokens, d] → y [tokens, d], added in order."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1)
    p = tl.arange(0, P)
    here = c < d
    begin(PDL)
    v = tl.load(
        partial + (p[:, None] * tokens + t) * d + c[None, :],
        mask=(p < programs)[:, None] & here[None, :], other=0.0, eviction_policy="evict_last",
    )  # fmt: skip
    total = tl.sum(v, 0) + load_bias(down_bias, c, here, BIAS)
    tl.store(y + t * d + c, total.to(y.dtype.element_ty), mask=here)
