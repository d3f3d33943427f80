"""What decides which neurons are active, as kernels call it: by one exact projection, by a proxy in 4 bits, or given.

A decider is two functions, named in `ffn.DECIDERS`. The first takes the tokens as it needs them: x and its stride, the
tokens xs in registers, d, its own constants HOW. The second decides on a block of rows i that are `here`, by its own
tensors `by`, or by the weight `first` too. It returns for each token whether a row is active, bool [rows], and what it
knows of the coefficients then, float32 [rows], or nothing. It need not look at phases, nor at which rows are there.

The packing of a proxy is that of `weights.symmetric`. A word holds eight neighbouring levels, 0 to 15, in its low and
in its high half bytes. Inputs are rounded to 8 bits, so that four products are one instruction where there is one. For
a group, Σ (level − 7.5) x is Σ level x − 7.5 Σ x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.kernel_parts import (
    activate,
    add_bias,
    begin,
    dots,
    factor,
    is_above,
    is_active,
    is_inside,
    load_rows,
)


@triton.jit
def as_they_are(x, x_stride, xs, d, HOW: tl.constexpr, T: tl.constexpr):
    """The tokens as they stand in registers."""
    return xs


@triton.jit
def by_projection(by, first, xs, like, i, here, c, inside, HOW: tl.constexpr, ACT: tl.constexpr):
    """One exact projection against its thresholds; it is one of the two factors.

    by: the bias of `first`, thresholds [h]. HOW: whether `first` is the gate.
    """
    bias, per_neuron = by
    z = dots(load_rows(first, i, c, here[:, None] & inside[None, :]), xs)
    threshold = tl.load(per_neuron + i, mask=here, other=0.0)
    active = ()
    values = ()
    for t in tl.static_range(len(xs)):
        zt = add_bias(z[t], bias, i, here)
        v = factor(zt, like, HOW[0], ACT)
        active = active + (is_active(v, zt, threshold),)
        values = values + (v,)
    return active, values


@triton.jit
def given(by, first, xs, like, i, here, c, inside, HOW: tl.constexpr, ACT: tl.constexpr):
    """by: active sets [T, h] int8, and h."""
    active_set, h = by
    active = ()
    for t in tl.static_range(len(xs)):
        active = active + (tl.load(active_set + t * h + i, mask=here, other=0) != 0,)
    return active, ()


@triton.jit
def by_proxy(by, first, tokens, like, i, here, c, inside, HOW: tl.constexpr, ACT: tl.constexpr):
    """Coefficients by a proxy in 4 bits against their thresholds.

    by: levels and scales of gate and of up, their biases, thresholds [h]. HOW: see `quantised`.
    """
    gate, up, biases, per_neuron = by
    gate_rows = load_levels(gate, i, here, HOW)
    up_rows = load_levels(up, i, here, HOW)
    threshold = tl.load(per_neuron + i, mask=here, other=0.0)
    active = ()
    for t in tl.static_range(len(tokens)):
        g = products_of_levels(gate_rows, tokens[t], HOW)
        u = products_of_levels(up_rows, tokens[t], HOW)
        g, u = tl.split(tl.sum(tl.join(g, u), 1) * tokens[t][3])  # together: a sum across warps waits for all of them
        s = activate(add_bias(g, biases[0], i, here), ACT) * add_bias(u, biases[1], i, here)
        active = active + (is_above(s, threshold),)
    return active, ()


@triton.jit
def rounded_here(x, x_stride, xs, d, HOW: tl.constexpr, T: tl.constexpr):
    """The tokens `quantised`, in every program: quicker than waiting for another kernel."""
    tokens = ()
    for t in tl.static_range(T):
        tokens = tokens + (quantised(x + t * x_stride, None, d, HOW),)
    return tokens


@triton.jit
def rounded_before(x, x_stride, xs, d, HOW: tl.constexpr, T: tl.constexpr):
    """The tokens as `quantise_tokens` left them; x: its words, sums and steps."""
    words, sums, steps = x
    WORDS: tl.constexpr = HOW[0]
    W: tl.constexpr = HOW[1]
    GROUPS: tl.constexpr = HOW[0] // HOW[2]
    word = tl.arange(0, W)
    g = tl.arange(0, W // HOW[2])
    inside = is_inside(word, WORDS, W)
    tokens = ()
    for t in tl.static_range(T):
        low = tl.load(words + t * 2 * WORDS + word, mask=inside, other=0)
        high = tl.load(words + (t * 2 + 1) * WORDS + word, mask=inside, other=0)
        total = tl.load(sums + t * GROUPS + g, mask=g < GROUPS, other=0.0)
        tokens = tokens + ((low, high, total, tl.load(steps + t)),)
    return tokens


@triton.jit
def quantise_tokens(x, words, sums, steps, d, x_stride, HOW: tl.constexpr, PDL: tl.constexpr):
    """x [T, d] → words [T, 2, WORDS] int32, sums [T, groups] float32, steps [T]: `quantised`, a program a token."""
    t = tl.program_id(0)
    WORDS: tl.constexpr = HOW[0]
    W: tl.constexpr = HOW[1]
    GROUPS: tl.constexpr = HOW[0] // HOW[2]
    w = tl.arange(0, W)
    g = tl.arange(0, W // HOW[2])
    begin(PDL)
    low, high, total, step = quantised(x + t * x_stride, None, d, HOW)
    tl.store(words + t * 2 * WORDS + w, low, mask=w < WORDS)
    tl.store(words + (t * 2 + 1) * WORDS + w, high, mask=w < WORDS)
    tl.store(sums + t * GROUPS + g, total, mask=g < GROUPS)
    tl.store(steps + t, step)


@triton.jit
def quantised(x, channels, d, HOW: tl.constexpr):
    """A token, over `channels` [d] if there are any, in 255 even steps between ± its largest entry, as
    `weights.symmetric.round_tokens`.

    HOW: words of a row, the power of two W that they fit, words of a group, whether there is an instruction for four
    products of bytes. x [d] → words [W] int32 of entries 8w to 8w + 3, words [W] of entries 8w + 4 to 8w + 7, 7.5 Σ of
    the entries of each group [groups], and the step. The step is not finite, and no product with it, where an entry is
    not.
    """
    W: tl.constexpr = HOW[1]
    GROUP: tl.constexpr = HOW[2]
    DOT4: tl.constexpr = HOW[3]
    w = tl.arange(0, W)
    half = tl.arange(0, 2)
    j = tl.arange(0, 4)
    c = w[:, None, None] * 8 + half[None, :, None] * 4 + j[None, None, :]
    xv = tl.load(x + c, mask=c < d, other=0.0).to(tl.float32)
    if channels is not None:
        xv = tl.div_rn(xv, tl.load(channels + c, mask=c < d, other=1.0))
    largest = tl.reduce(tl.reshape(tl.abs(xv), [W * 8]), 0, _larger)
    q = xv * tl.where(largest > 0, tl.minimum(tl.div_rn(127.0, largest), 3e38), 0.0)
    q = _in_low_bits(tl.where(tl.abs(q) < 128, q, 0.0), DOT4)
    low, high = tl.split(tl.sum((q & 255) << (8 * j)[None, None, :], 2))
    ones = tl.full([W], 0x01010101, tl.int32)
    total = _products(ones, high, _products(ones, low, tl.zeros([W], tl.int32), DOT4), DOT4)
    total = tl.sum(tl.reshape(total, [W // GROUP, GROUP]), 1)
    return low, high, 7.5 * total.to(tl.float32), tl.div_rn(largest, 127.0)


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
def load_levels(proxy, i, here, HOW: tl.constexpr):
    """Rows i of a matrix in 4 bits: words of levels [rows, W] int32 and scales [rows, groups] float32."""
    levels, scales = proxy
    WORDS: tl.constexpr = HOW[0]
    W: tl.constexpr = HOW[1]
    GROUPS: tl.constexpr = HOW[0] // HOW[2]
    G: tl.constexpr = HOW[1] // HOW[2]
    word = tl.arange(0, W)
    g = tl.arange(0, G)
    v = tl.load(
        levels + i[:, None] * WORDS + word[None, :],
        mask=here[:, None] & is_inside(word, WORDS, W)[None, :], other=0, eviction_policy="evict_first",
    )  # fmt: skip
    scale = tl.load(
        scales + i[:, None] * GROUPS + g[None, :],
        mask=here[:, None] & is_inside(g, GROUPS, G)[None, :], other=0.0, eviction_policy="evict_first",
    )  # fmt: skip
    return v, scale.to(tl.float32)


@triton.jit
def products_of_levels(rows, token, HOW: tl.constexpr):
    """Rows of W x by group, float32 [rows, groups], in steps of the token."""
    v, scale = rows
    low, high, sums, _ = token
    R: tl.constexpr = v.shape[0]
    W: tl.constexpr = HOW[1]
    GROUP: tl.constexpr = HOW[2]
    DOT4: tl.constexpr = HOW[3]
    acc = _products(v & 0x0F0F0F0F, tl.broadcast_to(low[None, :], [R, W]), tl.zeros([R, W], tl.int32), DOT4)
    acc = _products((v >> 4) & 0x0F0F0F0F, tl.broadcast_to(high[None, :], [R, W]), acc, DOT4)
    total = tl.sum(tl.reshape(acc, [R, W // GROUP, GROUP]), 2)
    return (total.to(tl.float32) - sums[None, :]) * scale
