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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _begin(PDL: tl.constexpr):
    # Programmatic dependent launch (Hopper and later): start while the kernel before ends, and wait for its results.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _activate(g, ACT: tl.constexpr):
    if ACT == "silu":
        a = g * tl.sigmoid(g)
    elif ACT == "gelu_tanh":
        # (1 + tanh z) / 2 is sigmoid(2z).
        a = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif ACT == "gelu":
        a = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "relu")
        a = tl.where(g <= 0, 0.0, g)  # NaN stays
    return a


@triton.jit
def _dot(a, b, acc):
    if _INTERPRETED:  # its dot takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _rounded(v, like):
    # As the dense FFN rounds its projections, so that active sets are those of the reference.
    return v.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _rows(w, i, stride, c, mask):
    offsets = i[:, None].to(tl.int64) * stride + c[None, :]
    return tl.load(w + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _bias(b, i, mask, HAS: tl.constexpr):
    v = tl.zeros(i.shape, tl.float32)
    if HAS:
        v = tl.load(b + i, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _inside(c, d: tl.constexpr, D: tl.constexpr):
    # A mask that is known to hold costs nothing.
    if d == D:
        inside = tl.full([D], True, tl.int1)
    else:
        inside = c < d
    return inside


@triton.jit
def _pick(v, k, o):
    # v[o] of a vector in registers, k = 0, 1, ...
    return tl.sum(tl.where(k[None, :] == o[:, None], v[None, :], 0), 1)


@triton.jit
def decide_and_sum(
    x, first, other, down, first_bias, other_bias, per_neuron, partial, counts,
    h, first_stride, other_stride, down_stride, d: tl.constexpr,
    GATE_FIRST: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr, MINE: tl.constexpr,
    STAGES: tl.constexpr, GATHER_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: Σ over the active neurons of this program's rows, and how many they are.

    x [d] → partial [P, d] float32, counts [P] int32. `first` is the projection that decides, `other` the one that is
    read at active rows. Program p takes blocks of ROWS rows, p, p + P, ...: neighbours read neighbouring memory at
    about the same time. D ≥ d and MINE ≥ its rows are powers of two.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, D)
    inside = _inside(c, d, D)
    b = tl.arange(0, ROWS)
    k = tl.arange(0, MINE)
    _begin(PDL)
    xv = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    # The input of a token that is not finite says nothing about which neurons matter.
    all_active = tl.sum(tl.where(tl.abs(xv) < float("inf"), 0, 1), 0) > 0

    index = tl.zeros([MINE], tl.int32)
    value = tl.zeros([MINE], tl.float32)
    n = 0
    for start in tl.range(p * ROWS, h, programs * ROWS, num_stages=STAGES):
        i = start + b
        here = i < h
        w = _rows(first, i, first_stride, c, here[:, None] & inside[None, :])
        v = _rounded(tl.sum(w * xv[None, :], 1) + _bias(first_bias, i, here, BIAS), x)
        if GATE_FIRST:
            v = _rounded(_activate(v, ACT), x)
        threshold = tl.load(per_neuron + i, mask=here, other=0.0)
        active = here & (all_active | ~(tl.abs(v) <= threshold))
        one = active.to(tl.int32)
        position = n + tl.cumsum(one, 0) - one
        to = active[:, None] & (position[:, None] == k[None, :])
        index += tl.sum(tl.where(to, i[:, None], 0), 0)
        value += tl.sum(tl.where(to, v[:, None], 0.0), 0)
        n += tl.sum(one, 0)

    y = tl.zeros([D], tl.float32)
    for start in tl.range(0, n, GATHER, num_stages=GATHER_STAGES):
        o = start + tl.arange(0, GATHER)
        here = o < n
        i = _pick(index, k, o)
        mask = here[:, None] & inside[None, :]
        w = _rows(other, i, other_stride, c, mask)
        column = _rows(down, i, down_stride, c, mask)
        v = tl.sum(w * xv[None, :], 1) + _bias(other_bias, i, here, BIAS)
        if not GATE_FIRST:
            v = _activate(v, ACT)
        s = tl.where(here, v * _pick(value, k, o), 0.0)
        y += tl.sum(column * s[:, None], 0)
    tl.store(partial + p * d + c, y, mask=inside, eviction_policy="evict_last")
    tl.store(counts + p, n)


@triton.jit
def sum_listed(
    x, gate, up, down, gate_bias, up_bias, listed, count, partial,
    h, gate_stride, up_stride, down_stride, d: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, GATHER: tl.constexpr, MINE: tl.constexpr, GATHER_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: Σ over listed neurons, of which program p takes every P-th.

    x [d], listed [h] int32 of which the first `count[0]` hold → partial [P, d] float32.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, D)
    inside = _inside(c, d, D)
    k = tl.arange(0, MINE)
    _begin(PDL)
    # Not masked by the count, so that both loads are under way at once.
    index = tl.load(listed + p + k * programs, mask=p + k * programs < h, other=0)
    n = (tl.load(count) - p + programs - 1) // programs
    xv = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros([D], tl.float32)
    for start in tl.range(0, n, GATHER, num_stages=GATHER_STAGES):
        o = start + tl.arange(0, GATHER)
        here = o < n
        i = _pick(index, k, o)
        mask = here[:, None] & inside[None, :]
        wu = _rows(up, i, up_stride, c, mask)
        wg = _rows(gate, i, gate_stride, c, mask)
        column = _rows(down, i, down_stride, c, mask)
        u = tl.sum(wu * xv[None, :], 1) + _bias(up_bias, i, here, BIAS)
        g = tl.sum(wg * xv[None, :], 1) + _bias(gate_bias, i, here, BIAS)
        s = tl.where(here, _activate(g, ACT) * u, 0.0)
        y += tl.sum(column * s[:, None], 0)
    tl.store(partial + p * d + c, y, mask=inside, eviction_policy="evict_last")


@triton.jit
def project_one(
    x, w, bias, y, h, stride, d: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: y = W x + b. x [d] → y [h], ROWS of them a program."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = i < h
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    _begin(PDL)
    for start in tl.range(0, d, BLOCK, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK)
        inside = _inside(c, d, BLOCK)
        xv = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
        acc += _rows(w, i, stride, c, here[:, None] & inside[None, :]) * xv[None, :]
    total = tl.sum(acc, 1) + _bias(bias, i, here, BIAS)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=here)


@triton.jit
def list_active(active, listed, count, h, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """active [h] → listed [h] int32, its neurons in order, and count [1]. One program."""
    _begin(PDL)
    n = 0
    for start in range(0, h, BLOCK):
        i = start + tl.arange(0, BLOCK)
        one = (tl.load(active + i, mask=i < h, other=0) != 0).to(tl.int32)
        tl.store(listed + n + tl.cumsum(one, 0) - one, i, mask=one != 0)
        n += tl.sum(one, 0)
    tl.store(count, n)


@triton.jit
def _project(x, w, b, i, here, tokens, d, x_stride, stride, BIAS: tl.constexpr, BLOCK: tl.constexpr,
             T: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
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
        acc = _dot(wv, tl.trans(xv), acc)
    return acc + _bias(b, i, here, BIAS)[:, None]


@triton.jit
def _all_active(x, tokens, d, x_stride, T: tl.constexpr, BLOCK: tl.constexpr):
    # Tokens whose input is not finite, [T].
    t = tl.arange(0, T)
    bad = tl.zeros([T], tl.int32)
    for start in range(0, d, BLOCK):
        c = start + tl.arange(0, BLOCK)
        xv = tl.load(x + t[:, None] * x_stride + c[None, :], mask=(t < tokens)[:, None] & (c < d)[None, :], other=0.0)
        bad += tl.sum(tl.where(tl.abs(xv.to(tl.float32)) < float("inf"), 0, 1), 1)
    return bad > 0


@triton.jit
def coefficients(
    x, first, other, first_bias, other_bias, per_neuron, active_set, s, needs, counts,
    tokens, d, h, x_stride, first_stride, other_stride,
    MODE: tl.constexpr, GATE_FIRST: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: coefficients of each token's active neurons, 0 elsewhere, for this program's rows.

    x [tokens, d] → s [h, T] in the dtype of x; needs [h] int8, whether any token needs a neuron; counts [P] int32. MODE
    `decide`: `first` and the thresholds decide. `given`: active_set [tokens, h] int8 does. `select`: decide, write
    active_set, and no more.
    """
    p = tl.program_id(0)
    i = p * ROWS + tl.arange(0, ROWS)
    here = i < h
    t = tl.arange(0, T)
    place = t[None, :] * h + i[:, None]
    valid = here[:, None] & (t < tokens)[None, :]
    _begin(PDL)
    if MODE == "given":
        active = tl.load(active_set + place, mask=valid, other=0) != 0
        needed = tl.sum(active.to(tl.int32), 1) > 0
        v = _project(x, first, first_bias, i, needed, tokens, d, x_stride, first_stride, BIAS, BLOCK, T, STAGES)
        v = _rounded(v, x)
        if GATE_FIRST:
            v = _rounded(_activate(v, ACT), x)
    else:
        v = _project(x, first, first_bias, i, here, tokens, d, x_stride, first_stride, BIAS, BLOCK, T, STAGES)
        v = _rounded(v, x)
        if GATE_FIRST:
            v = _rounded(_activate(v, ACT), x)
        threshold = tl.load(per_neuron + i, mask=here, other=0.0)
        all_active = _all_active(x, tokens, d, x_stride, T, BLOCK)
        active = valid & (all_active[None, :] | ~(tl.abs(v) <= threshold[:, None]))
        if MODE == "select":
            tl.store(active_set + place, active.to(tl.int8), mask=valid)
        needed = tl.sum(active.to(tl.int32), 1) > 0
    if MODE != "select":
        w = _project(x, other, other_bias, i, needed, tokens, d, x_stride, other_stride, BIAS, BLOCK, T, STAGES)
        if not GATE_FIRST:
            w = _activate(_rounded(w, x), ACT)
        product = tl.where(active, v * w, 0.0)
        tl.store(s + i[:, None] * T + t[None, :], product.to(s.dtype.element_ty), mask=here[:, None])
        tl.store(needs + i, needed.to(tl.int8), mask=here)
        tl.store(counts + p, tl.sum(tl.sum(active.to(tl.int32), 1), 0))


@triton.jit
def sum_columns(
    s, needs, down, partial, tokens, d, h, down_stride, per_program,
    T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: Σ s_i w_i over this program's neurons and columns.

    s [h, T], needs [h] int8: the neurons that some token needs → partial [P, tokens, d] float32.
    """
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.program_id(1)
    t = tl.arange(0, T)
    y = tl.zeros([T, COLUMNS], tl.float32)
    _begin(PDL)
    stop = tl.minimum((p + 1) * per_program, h)
    for start in tl.range(p * per_program, stop, ROWS, num_stages=STAGES):
        i = start + tl.arange(0, ROWS)
        needed = tl.load(needs + i, mask=i < stop, other=0) != 0
        sv = tl.load(s + i[:, None] * T + t[None, :], mask=(i < stop)[:, None], other=0.0)
        wv = tl.load(
            down + i[:, None].to(tl.int64) * down_stride + c[None, :],
            mask=needed[:, None] & (c < d)[None, :], other=0.0, eviction_policy="evict_first",
        )  # fmt: skip
        y = _dot(tl.trans(sv), wv, y)
    to = partial + (p * tokens + t[:, None]) * d + c[None, :]
    tl.store(to, y, mask=(t < tokens)[:, None] & (c < d)[None, :], eviction_policy="evict_last")


@triton.jit
def reduce(
    partial, bias, y, counts, counters, programs, counted, tokens, d,
    BIAS: tl.constexpr, COUNT: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial [programs, tokens, d] → y [tokens, d], added in order; counters += (tokens, Σ counts)."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1)
    p = tl.arange(0, P)
    inside = c < d
    _begin(PDL)
    v = tl.load(
        partial + (p[:, None] * tokens + t) * d + c[None, :],
        mask=(p < programs)[:, None] & inside[None, :], other=0.0, eviction_policy="evict_last",
    )  # fmt: skip
    total = tl.sum(v, 0) + _bias(bias, c, inside, BIAS)
    tl.store(y + t * d + c, total.to(y.dtype.element_ty), mask=inside)
    if COUNT:
        if (tl.program_id(0) == 0) & (t == 0):
            k = tl.arange(0, C)
            active = tl.sum(tl.load(counts + k, mask=k < counted, other=0).to(tl.int64), 0)
            tl.store(counters, tl.load(counters) + tokens)
            tl.store(counters + 1, tl.load(counters + 1) + active)
