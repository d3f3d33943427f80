"""Kernels that decide by a 4-bit proxy. Letters as in `ops.schema`; the packing is that of `ops.proxy`.

A word holds eight neighbouring levels, 0 to 15, in its low and in its high half bytes. Inputs are rounded to 8 bits, so
that four products are one instruction where there is one. For a group, Σ (level − 7.5) x is Σ level x − 7.5 Σ x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.kernel_parts import (
    activate,
    begin,
    count,
    exists,
    gather_and_sum,
    is_above,
    is_inside,
    keep_active,
    load_bias,
)


@triton.jit
def _products(a, b, acc, DOT4: tl.constexpr):
    # acc + Σ of four products of bytes, those of a from 0 to 15, those of b signed.
    if DOT4:
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for j in tl.static_range(4):
            acc += ((a >> (8 * j)) & 15) * ((b << (24 - 8 * j)) >> 24)
    return acc


@triton.jit
def _in_low_bits(v, ASM: tl.constexpr):
    # Adding 1.5 · 2²³ rounds to an integer, halves to even, which then stands in the low bits. As assembly, so that the
    # product v and the sum do not become one instruction, which would round once.
    if ASM:
        bits = tl.inline_asm_elementwise(
            "{ .reg .f32 t; add.rn.f32 t, $1, 0f4B400000; mov.b32 $0, t; }", "=r,f", [v],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        bits = (v + 12582912.0).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantised(x, d, W: tl.constexpr, GROUP: tl.constexpr, DOT4: tl.constexpr):
    """A token in 255 even steps between ± its largest entry, as `proxy.round_tokens`.

    x [d] → words [W] int32 of entries 8w to 8w + 3, words [W] of entries 8w + 4 to 8w + 7, 7.5 Σ of the entries of each
    group of GROUP words [groups], and the step. The step is not finite, and no product with it, where an entry is not.
    """
    w = tl.arange(0, W)
    half = tl.arange(0, 2)
    j = tl.arange(0, 4)
    c = w[:, None, None] * 8 + half[None, :, None] * 4 + j[None, None, :]
    xv = tl.load(x + c, mask=c < d, other=0.0).to(tl.float32)
    largest = tl.reduce(tl.reshape(tl.abs(xv), [W * 8]), 0, _larger)
    q = xv * tl.where(largest > 0, tl.minimum(tl.div_rn(127.0, largest), 3e38), 0.0)
    q = _in_low_bits(tl.where(tl.abs(q) < 128, q, 0.0), DOT4)
    low, high = tl.split(tl.sum((q & 255) << (8 * j)[None, None, :], 2))
    ones = tl.full([W], 0x01010101, tl.int32)
    total = _products(ones, high, _products(ones, low, tl.zeros([W], tl.int32), DOT4), DOT4)
    total = tl.sum(tl.reshape(total, [W // GROUP, GROUP]), 1)
    return low, high, 7.5 * total.to(tl.float32), tl.div_rn(largest, 127.0)


@triton.jit
def quantise_tokens(
    x, words, sums, steps, d, x_stride,
    WORDS: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, DOT4: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [T, d] → words [T, 2, WORDS] int32, sums [T, groups] float32, steps [T]: `quantised`, a program a token."""
    t = tl.program_id(0)
    w = tl.arange(0, W)
    g = tl.arange(0, W // GROUP)
    begin(PDL)
    low, high, total, step = quantised(x + t * x_stride, d, W, GROUP, DOT4)
    tl.store(words + t * 2 * WORDS + w, low, mask=w < WORDS)
    tl.store(words + (t * 2 + 1) * WORDS + w, high, mask=w < WORDS)
    tl.store(sums + t * (WORDS // GROUP) + g, total, mask=g < WORDS // GROUP)
    tl.store(steps + t, step)


@triton.jit
def load_proxy(
    levels, scales, i, here, word, WORDS: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Rows i of a proxy: words of levels [rows, W] int32 and scales [rows, groups] float32."""
    G: tl.constexpr = W // GROUP
    g = tl.arange(0, G)
    mask = here[:, None] & is_inside(word, WORDS, W)[None, :]
    v = tl.load(levels + i[:, None] * WORDS + word[None, :], mask=mask, other=0, eviction_policy="evict_first")
    scale = tl.load(
        scales + i[:, None] * (WORDS // GROUP) + g[None, :],
        mask=here[:, None] & is_inside(g, WORDS // GROUP, G)[None, :], other=0.0, eviction_policy="evict_first",
    )  # fmt: skip
    return v, scale.to(tl.float32)


@triton.jit
def _products_of_rows(v, scale, low, high, sums, W: tl.constexpr, GROUP: tl.constexpr, DOT4: tl.constexpr):
    """Rows of the proxy's W x by group, float32 [rows, groups], in steps of the token."""
    R: tl.constexpr = v.shape[0]
    acc = _products(v & 0x0F0F0F0F, tl.broadcast_to(low[None, :], [R, W]), tl.zeros([R, W], tl.int32), DOT4)
    acc = _products((v >> 4) & 0x0F0F0F0F, tl.broadcast_to(high[None, :], [R, W]), acc, DOT4)
    total = tl.sum(tl.reshape(acc, [R, W // GROUP, GROUP]), 2)
    return (total.to(tl.float32) - sums[None, :]) * scale


@triton.jit
def coefficient(gate, up, gb, ub, token, ACT: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, DOT4: tl.constexpr):
    """ŝ of some rows for one token, float32 [rows]; gate, up as `load_proxy` gives them, token as `quantised`."""
    low, high, sums, step = token
    g = _products_of_rows(gate[0], gate[1], low, high, sums, W, GROUP, DOT4)
    u = _products_of_rows(up[0], up[1], low, high, sums, W, GROUP, DOT4)
    g, u = tl.split(tl.sum(tl.join(g, u), 1) * step)  # together: a sum across warps waits for all of them
    return activate(g + gb, ACT) * (u + ub)


@triton.jit
def select_by_proxy(
    words, sums, steps, gate_levels, gate_scales, up_levels, up_scales, gate_bias, up_bias, per_neuron, active_set,
    counters, tokens, h, ACT: tl.constexpr, BIAS: tl.constexpr, COUNT: tl.constexpr, T: tl.constexpr,
    WORDS: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, DOT4: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Which neurons of this program's rows each token needs: active_set [tokens, h] int8; COUNT: counters as well.

    What `quantise_tokens` left of up to T tokens stays in registers, so that a row of the proxy is read once for all.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    word = tl.arange(0, W)
    g = tl.arange(0, W // GROUP)
    begin(PDL)
    rounded = ()
    for t in tl.static_range(T):
        inside = is_inside(word, WORDS, W) & exists(t, tokens)
        low = tl.load(words + t * 2 * WORDS + word, mask=inside, other=0)
        high = tl.load(words + (t * 2 + 1) * WORDS + word, mask=inside, other=0)
        total = tl.load(
            sums + t * (WORDS // GROUP) + g, mask=(g < WORDS // GROUP) & exists(t, tokens), other=0.0
        )  # fmt: skip
        rounded = rounded + ((low, high, total, tl.load(steps + tl.minimum(t, tokens - 1))),)
    n = 0
    for start in tl.range(p * ROWS, h, programs * ROWS, num_stages=STAGES):
        i = start + tl.arange(0, ROWS)
        here = i < h
        gb = load_bias(gate_bias, i, here, BIAS)
        ub = load_bias(up_bias, i, here, BIAS)
        threshold = tl.load(per_neuron + i, mask=here, other=0.0)
        gate = load_proxy(gate_levels, gate_scales, i, here, word, WORDS, W, GROUP)
        up = load_proxy(up_levels, up_scales, i, here, word, WORDS, W, GROUP)
        for t in tl.static_range(T):
            s = coefficient(gate, up, gb, ub, rounded[t], ACT, W, GROUP, DOT4)
            active = here & exists(t, tokens) & is_above(s, threshold)
            tl.store(active_set + t * h + i, active.to(tl.int8), mask=here & exists(t, tokens))
            n += tl.sum(active.to(tl.int32), 0)
    if COUNT:
        count(counters, p == 0, tokens, n)


@triton.jit
def decide_by_proxy_and_sum(
    x, gate, up, down, gate_bias, up_bias, gate_levels, gate_scales, up_levels, up_scales,
    per_neuron, partial, counters,
    h, gate_stride, up_stride, down_stride, d: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, WORDS: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
    DOT4: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr, MINE: tl.constexpr,
    STAGES: tl.constexpr, GATHER_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: Σ over the neurons of this program's rows that the proxy finds active, all three rows exact.

    Every program rounds the token itself: that is quicker than waiting for another kernel. Else as
    `kernels.decide_and_sum`.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, D)
    inside = is_inside(c, d, D)
    b = tl.arange(0, ROWS)
    k = tl.arange(0, MINE)
    word = tl.arange(0, W)
    begin(PDL)
    xv = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    token = quantised(x, d, W, GROUP, DOT4)
    index = tl.zeros([MINE], tl.int32)
    n = 0
    for start in tl.range(p * ROWS, h, programs * ROWS, num_stages=STAGES):
        i = start + b
        here = i < h
        s = coefficient(
            load_proxy(gate_levels, gate_scales, i, here, word, WORDS, W, GROUP),
            load_proxy(up_levels, up_scales, i, here, word, WORDS, W, GROUP),
            load_bias(gate_bias, i, here, BIAS), load_bias(up_bias, i, here, BIAS), token, ACT, W, GROUP, DOT4,
        )  # fmt: skip
        active = here & is_above(s, tl.load(per_neuron + i, mask=here, other=0.0))
        index, n, _ = keep_active(index, n, i, active, k)
    count(counters, p == 0, tl.full([], 1, tl.int64), n)
    y = gather_and_sum(
        xv, gate, up, down, gate_bias, up_bias, index, k, n, gate_stride, up_stride, down_stride, c, inside,
        ACT, BIAS, D, GATHER, GATHER_STAGES,
    )  # fmt: skip
    tl.store(partial + p * d + c, y, mask=inside, eviction_policy="evict_last")
