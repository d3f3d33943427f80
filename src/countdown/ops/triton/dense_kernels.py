"""Kernels of a decoding step beside the FFN: dense products of one token, and its attention. For decode loops."""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.kernel_parts import add_bias, begin, dot, is_inside
from countdown.ops.triton.loaders import plain


@triton.jit
def project_one(
    x, w0, w1, w2, b0, b1, b2, y, h0, h1, h2, d: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: y = (W_0 x + b_0, W_1 x + b_1, W_2 x + b_2). x [d] → y [h0 + h1 + h2], ROWS of them a program."""
    p = tl.program_id(0)
    before1 = tl.cdiv(h0, ROWS)
    before2 = before1 + tl.cdiv(h1, ROWS)
    if p < before1:
        w, b, h, to = w0, b0, h0, y
    elif p < before2:
        w, b, h, to = w1, b1, h1, y + h0
        p -= before1
    else:
        w, b, h, to = w2, b2, h2, y + h0 + h1
        p -= before2
    i = p * ROWS + tl.arange(0, ROWS)
    here = i < h
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    begin(PDL)
    for start in tl.range(0, d, BLOCK, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK)
        if d % BLOCK == 0:
            inside = is_inside(c, BLOCK, BLOCK)
        else:
            inside = c < d
        xv = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
        acc += plain((None, w, d), i, c, here[:, None] & inside[None, :]).to(tl.float32) * xv[None, :]
    total = tl.sum(acc, 1)
    if BIAS:
        total = add_bias(total, b, i, here)
    tl.store(to + i, total.to(y.dtype.element_ty), mask=here)


@triton.jit
def attend_block(
    q, keys, values, mask, largest, total, partial, scale,
    length, size, query_stride, key_stride, key_step, value_stride, value_step,
    QUERIES: tl.constexpr, MASK: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The queries that share a group's keys, attending to one block of them.

    q [groups * QUERIES, size], keys and values [groups, length, size], mask [length] → for group g and block s, at
    place g * blocks + s: largest score [R] and sum of exponentials [R], partial [R, size], float32.
    """
    g = tl.program_id(0)
    s = tl.program_id(1)
    place = (g * tl.num_programs(1) + s) * R
    r = tl.arange(0, R)
    e = tl.arange(0, N)
    j = s * BLOCK + tl.arange(0, BLOCK)
    here = (j < length)[:, None] & (e < size)[None, :]
    begin(PDL)
    qv = tl.load(
        q + (g * QUERIES + r[:, None]) * query_stride + e[None, :],
        mask=(r < QUERIES)[:, None] & (e < size)[None, :], other=0.0,
    )  # fmt: skip
    kv = tl.load(keys + g.to(tl.int64) * key_stride + j[:, None] * key_step + e[None, :], mask=here, other=0.0)
    vv = tl.load(values + g.to(tl.int64) * value_stride + j[:, None] * value_step + e[None, :], mask=here, other=0.0)
    seen = j < length
    if MASK:
        seen = seen & (tl.load(mask + j, mask=seen, other=0) != 0)
    score = dot(qv, tl.trans(kv), tl.zeros([R, BLOCK], tl.float32), "ieee") * scale
    score = tl.where(seen[None, :], score, float("-inf"))
    most = tl.max(score, 1)
    weight = tl.where(seen[None, :], tl.exp(score - most[:, None]), 0.0)
    out = dot(weight.to(vv.dtype), vv, tl.zeros([R, N], tl.float32), "ieee")
    tl.store(largest + place + r, most)
    tl.store(total + place + r, tl.sum(weight, 1))
    tl.store(partial + (place + r[:, None]) * size + e[None, :], out, mask=(e < size)[None, :])


@triton.jit
def attend_all(
    largest, total, partial, y, blocks, size,
    QUERIES: tl.constexpr, R: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What `attend_block` left of each block, put together: y [groups * QUERIES, size], a query a program."""
    query = tl.program_id(0)
    s = tl.arange(0, S)
    e = tl.arange(0, N)
    place = (query // QUERIES * blocks + s) * R + query % QUERIES
    begin(PDL)
    most = float("-inf")
    weight = 0.0
    out = tl.zeros([N], tl.float32)
    for first in range(0, blocks, S):
        there = first + s < blocks
        at = place + first * R
        some = tl.load(largest + at, mask=there, other=float("-inf"))
        higher = tl.maximum(most, tl.max(some, 0))
        # Blocks, and what came before, that hide every key have no weight.
        factor = tl.where(some > float("-inf"), tl.exp(some - higher), 0.0)
        before = tl.where(most > float("-inf"), tl.exp(most - higher), 0.0)
        v = tl.load(partial + at[:, None] * size + e[None, :], mask=there[:, None] & (e < size)[None, :], other=0.0)
        out = out * before + tl.sum(tl.where(factor[:, None] > 0, v * factor[:, None], 0.0), 0)
        weight = weight * before + tl.sum(tl.load(total + at, mask=there, other=0.0) * factor, 0)
        most = higher
    tl.store(y + query * size + e, (out / weight).to(y.dtype.element_ty), mask=e < size)
