"""Kernels of a decoding step beside what is sparse: products of one token, norms, attention. For decode loops.

A step is a row of kernels that each wait for the one before. So what no kernel of the step writes, weights and earlier
keys, is fetched before that wait, and memory is busy while small kernels run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.kernel_parts import (
    activate,
    add_bias,
    dot,
    is_inside,
    let_next_start,
    rounded,
    start_small,
    wait_for_last,
)
from countdown.ops.triton.loaders import plain


@triton.jit
def _columns(start, d: tl.constexpr, BLOCK: tl.constexpr):
    """Columns from `start` on, and which of them there are."""
    c = start + tl.arange(0, BLOCK)
    if d % BLOCK == 0:
        inside = is_inside(c, BLOCK, BLOCK)
    else:
        inside = c < d
    return c, inside


@triton.jit
def _rows(w, i, here, c, inside, d: tl.constexpr):
    return plain((None, w, d), i, c, here[:, None] & inside[None, :])


@triton.jit
def _times(rows, x, c, inside):
    xv = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
    return rows.to(tl.float32) * xv[None, :]


@triton.jit
def project_one(
    x, w0, w1, w2, b0, b1, b2, y, h0, h1, h2, d: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
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
    c, inside = _columns(0, d, BLOCK)
    let_next_start(PDL)
    first = _rows(w, i, here, c, inside, d)
    wait_for_last(PDL)
    acc = _times(first, x, c, inside)
    for start in tl.range(BLOCK, d, BLOCK, num_stages=STAGES):
        c, inside = _columns(start, d, BLOCK)
        acc += _times(_rows(w, i, here, c, inside, d), x, c, inside)
    total = tl.sum(acc, 1)
    if BIAS:
        total = add_bias(total, b, i, here)
    tl.store(to + i, total.to(y.dtype.element_ty), mask=here)


@triton.jit
def gated_one(
    x, gate, up, gate_bias, up_bias, y, h, d: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: y = act(W_gate x + b) · (W_up x + b), rounded where the dense FFN rounds. ROWS of each a program."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = i < h
    c, inside = _columns(0, d, BLOCK)
    let_next_start(PDL)
    g = _rows(gate, i, here, c, inside, d)
    u = _rows(up, i, here, c, inside, d)
    wait_for_last(PDL)
    gates = _times(g, x, c, inside)
    ups = _times(u, x, c, inside)
    for start in tl.range(BLOCK, d, BLOCK, num_stages=STAGES):
        c, inside = _columns(start, d, BLOCK)
        gates += _times(_rows(gate, i, here, c, inside, d), x, c, inside)
        ups += _times(_rows(up, i, here, c, inside, d), x, c, inside)
    gated = rounded(add_bias(tl.sum(gates, 1), gate_bias, i, here), y)
    a = rounded(activate(gated, ACT), y)
    product = a * rounded(add_bias(tl.sum(ups, 1), up_bias, i, here), y)
    tl.store(y + i, product.to(y.dtype.element_ty), mask=here)


@triton.jit
def normalise(
    x, x_stride, y, y_stride, weight, sums, out, d, eps,
    ROUNDED: tl.constexpr, OVERLAP: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMS norm of x + y, or of x, [rows, d], a row a program: sums [rows, d] = x + y, out [rows, d].

    ROUNDED: to the dtype of x before the weight is multiplied in; and after it in any case.
    """
    row = tl.program_id(0)
    c = tl.arange(0, N)
    inside = c < d
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    start_small(OVERLAP, PDL)
    v = tl.load(x + row * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        v = rounded(v + tl.load(y + row * y_stride + c, mask=inside, other=0.0).to(tl.float32), out)
        tl.store(sums + row * d + c, v.to(sums.dtype.element_ty), mask=inside)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / d + eps)
    if ROUNDED:
        v = rounded(v, out)
    tl.store(out + row * d + c, (v * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_halves(of, e, half, mask):
    first = tl.load(of + e, mask=mask, other=0.0)
    return first, tl.load(of + half + e, mask=mask, other=0.0)


@triton.jit
def _rotated(one, other, cos, sin, like):
    """A half that is rotated with the other half, rounded as it would be operation by operation."""
    return (rounded(one * cos, like) + rounded(other * sin, like)).to(like.dtype.element_ty)


@triton.jit
def _load_angles(rotation, e, half, inside):
    return _load_halves(rotation[0], e, half, inside), _load_halves(rotation[1], e, half, inside)


@triton.jit
def _rotate(halves, angles, like):
    """Halves [..., H], rotated by angles whose cosines and sines are halves, too; or as they are."""
    one, other = halves
    if angles is not None:
        first, second = halves[0].to(tl.float32), halves[1].to(tl.float32)
        cos, sin = angles
        one = _rotated(first, -second, cos[0].to(tl.float32), sin[0].to(tl.float32), like)
        other = _rotated(second, first, cos[1].to(tl.float32), sin[1].to(tl.float32), like)
    return one, other


@triton.jit
def _seen(mask, j, length):
    seen = j < length
    if mask is not None:
        seen = tl.load(mask + j, mask=seen, other=0) != 0
    return seen


@triton.jit
def attend_block(
    q, keys, values, new, rotation, mask, largest, total, partial, scale, length, half: tl.constexpr,
    query_stride, key_stride, key_step, value_stride, value_step,
    QUERIES: tl.constexpr, R: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The queries that share a group's keys, attending to one block of them.

    q [groups * QUERIES, 2 half], keys and values [groups, length, 2 half], mask [length] or None → for group g and
    block s, at place g * blocks + s: largest score [R] and sum of exponentials [R], partial [R, 2 half], float32.
    new: None, or a key and a value [groups, 2 half], how far groups are apart in them, and two integers whose sum is
    the place where they are put first. rotation: None, or cosines and sines [2 half], by which queries and the new key
    are rotated.
    """
    g = tl.program_id(0)
    s = tl.program_id(1)
    place = (g * tl.num_programs(1) + s) * R
    size: tl.constexpr = 2 * half
    r = tl.arange(0, R)
    e = tl.arange(0, H)[None, :]
    n = tl.arange(0, 2 * H)[None, :]
    inside = is_inside(tl.arange(0, H), half, H)[None, :]
    whole = is_inside(tl.arange(0, 2 * H), size, 2 * H)[None, :]
    j = s * BLOCK + tl.arange(0, BLOCK)
    here = (j < length)[:, None]
    own_keys = keys + g.to(tl.int64) * key_stride
    own_values = values + g.to(tl.int64) * value_stride
    if new is None:
        wait_for_last(PDL)
    let_next_start(PDL)
    k = _load_halves(own_keys + j[:, None] * key_step, e, half, here & inside)
    v = tl.load(own_values + j[:, None] * value_step + n, mask=here & whole, other=0.0)
    if new is not None:
        wait_for_last(PDL)
    # All of it is on its way before any is used.
    seen = _seen(mask, j, length)
    at_query = q + (g * QUERIES + r[:, None]) * query_stride
    queries = _load_halves(at_query, e, half, (r < QUERIES)[:, None] & inside)
    angles = None if rotation is None else _load_angles(rotation, e, half, inside)
    if new is not None:
        at = tl.load(new[4]) + tl.load(new[5])
        key = _load_halves(new[0] + g * new[2], e, half, inside)
        value = tl.load(new[1] + g * new[3] + n, mask=whole, other=0.0)
        key = _rotate(key, angles, keys)
        is_new = (j == at)[:, None]
        k = tl.where(is_new, key[0], k[0]), tl.where(is_new, key[1], k[1])
        v = tl.where(is_new, value, v)
    queries = _rotate(queries, angles, keys)
    score = dot(queries[0], tl.trans(k[0]), tl.zeros([R, BLOCK], tl.float32), "ieee")
    score = dot(queries[1], tl.trans(k[1]), score, "ieee") * scale
    score = tl.where(seen[None, :], score, float("-inf"))
    most = tl.max(score, 1)
    weight = tl.where(seen[None, :], tl.exp(score - most[:, None]), 0.0)
    out = dot(weight.to(v.dtype), v, tl.zeros([R, 2 * H], tl.float32), "ieee")
    tl.store(largest + place + r, most, mask=r < QUERIES)
    tl.store(total + place + r, tl.sum(weight, 1), mask=r < QUERIES)
    tl.store(partial + (place + r[:, None]) * size + n, out, mask=(r < QUERIES)[:, None] & whole)
    if new is not None:
        if at // BLOCK == s:  # the block that holds it
            tl.store(own_keys + at * key_step + e, key[0], mask=inside)
            tl.store(own_keys + at * key_step + half + e, key[1], mask=inside)
            tl.store(own_values + at * value_step + n, value, mask=whole)


@triton.jit
def attend_all(
    largest, total, partial, y, blocks, size: tl.constexpr,
    QUERIES: tl.constexpr, OVERLAP: tl.constexpr, R: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    MORE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What `attend_block` left of each block, put together: y [groups * QUERIES, size], a query a program.

    S blocks at a time; MORE: there are more than those.
    """
    query = tl.program_id(0)
    s = tl.arange(0, S)
    e = tl.arange(0, N)
    inside = is_inside(e, size, N)
    place = (query // QUERIES * blocks + s) * R + query % QUERIES
    start_small(OVERLAP, PDL)
    out, weight, most = _together(largest, total, partial, place, s < blocks, e, inside, size)
    if MORE:
        for first in range(S, blocks, S):
            at = place + first * R
            others, more, higher = _together(largest, total, partial, at, first + s < blocks, e, inside, size)
            highest = tl.maximum(most, higher)
            before = _factor(most, highest)
            after = _factor(higher, highest)
            out = out * before + others * after
            weight = weight * before + more * after
            most = highest
    tl.store(y + query * size + e, (out / weight).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _factor(most, highest):
    """The weight of scores relative to `most`, relative to `highest`; blocks that hide every key have none."""
    return tl.where(most > float("-inf"), tl.exp(most - highest), 0.0)


@triton.jit
def _together(largest, total, partial, at, there, e, inside, size):
    """Some blocks: Σ of values and of weights, and the largest score, that they are relative to."""
    v = tl.load(partial + at[:, None] * size + e[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    weights = tl.load(total + at, mask=there, other=0.0)
    some = tl.load(largest + at, mask=there, other=float("-inf"))
    most = tl.max(some, 0)
    factor = _factor(some, most)
    # What hidden keys leave is not looked at.
    return tl.sum(tl.where(factor[:, None] > 0, v * factor[:, None], 0.0), 0), tl.sum(weights * factor, 0), most


@triton.jit
def angles_one(position, frequencies, cos, sin, n, scale, N: tl.constexpr, PDL: tl.constexpr):
    """Cosines and sines [2 n] of position · frequencies, twice."""
    e = tl.arange(0, N)
    start_small(True, PDL)
    angle = tl.load(position).to(tl.float32) * tl.load(frequencies + e, mask=e < n, other=0.0)
    c = (tl.cos(angle) * scale).to(cos.dtype.element_ty)
    s = (tl.sin(angle) * scale).to(sin.dtype.element_ty)
    for half in tl.static_range(2):
        tl.store(cos + half * n + e, c, mask=e < n)
        tl.store(sin + half * n + e, s, mask=e < n)


@triton.jit
def rank_of(v):
    """An integer for each value, the larger the larger that is: the largest of all for NaN, as in torch."""
    bits = v.to(tl.float32).to(tl.int32, bitcast=True)
    # Of negative values the larger have the smaller bits; both zeros are alike.
    rank = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return tl.where(v != v, 0x7FFFFFFF, rank)


@triton.jit
def largest_of_block(logits, ranks, places, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Rank and place of the largest of each block, the first of several; see `rank_of`."""
    p = tl.program_id(0)
    i = p * BLOCK + tl.arange(0, BLOCK)
    start_small(True, PDL)
    rank = rank_of(tl.load(logits + i, mask=i < n, other=float("-inf")))
    most = tl.max(rank, 0)
    tl.store(ranks + p, most)
    tl.store(places + p, tl.min(tl.where((rank == most) & (i < n), i, n - 1), 0))


@triton.jit
def largest_of_all(ranks, places, y, blocks, n, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    """The place of the largest of all, the first of several."""
    p = tl.arange(0, BLOCKS)
    start_small(True, PDL)
    rank = tl.load(ranks + p, mask=p < blocks, other=-0x7FFFFFFF)
    place = tl.load(places + p, mask=p < blocks, other=n)
    most = tl.max(rank, 0)
    tl.store(y, tl.min(tl.where(rank == most, place, n), 0).to(tl.int64))
