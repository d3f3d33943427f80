"""Kernels of sparse linears, z = Σ_j x_j W[:, j] over active input channels j, for 1 to 8 tokens.

Letters as in `ops.call`: T tokens, d input channels. Weights are laid out by channel, so that what a channel is
multiplied with lies in a row. Up to three linears that read the same x, each with thresholds of its own, are one
launch: their outputs stand side by side, h0 + h1 + h2 of them.

A program takes a tile of columns and a few chunks of 64 channels. Which channels of a chunk a token needs becomes the
bits of a word, so that the addresses of rows follow from registers, and rows to come are on their way while those
before are added. Rows that no token needs are not read; the others are read once for all tokens. Programs leave partial
sums that `finish` adds in a fixed order: the same bits every time.

Of a token that is not finite every channel is active by definition. Here its channels that are not finite are, which
makes the same result where weights are finite and sums of what is finite do not overflow: no other sum with an infinity
in it depends on what else is finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.kernel_parts import (
    GENERATED,
    add_bias,
    begin,
    in_phase,
    is_above,
)


@triton.jit
def _place(tile, h0, h1, COLUMNS: tl.constexpr):
    """Which linear a tile is of, which tile of that, and where its outputs begin."""
    before1 = tl.cdiv(h0, COLUMNS)
    before2 = before1 + tl.cdiv(h1, COLUMNS)
    member = (tile >= before1).to(tl.int32) + (tile >= before2).to(tl.int32)
    first = tl.where(member == 0, 0, tl.where(member == 1, before1, before2))
    offset = tl.where(member == 0, 0, tl.where(member == 1, h0, h0 + h1))
    return member, tile - first, offset


@triton.jit
def _one_of(member, first, second, third):
    if member == 0:
        found = first
    elif member == 1:
        found = second
    else:
        found = third
    return found


@triton.jit
def _decided(xv, threshold):
    return is_above(xv, threshold) | ~(tl.abs(xv) < float("inf"))


@triton.jit
def _active(x, x_stride, thresholds, active_set, phases, t: tl.constexpr, i, d):
    """Whether token t needs channels i."""
    here = i < d
    if active_set is None:
        xv = tl.load(x + t * x_stride + i, mask=here, other=0.0).to(tl.float32)
        active = _decided(xv, tl.load(thresholds + i, mask=here, other=0.0))
        if phases is not None:
            active = in_phase(active, tl.load(phases + t))
    else:
        active = tl.load(active_set + t * d + i, mask=here, other=0) != 0
    return here & active


@triton.jit
def _words(x, x_stride, thresholds, active_set, phases, t: tl.constexpr, first, d,
           CHUNKS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The channels that token t needs of each chunk, int64 with a bit for each."""
    k = tl.arange(0, CHUNK)
    words = ()
    for chunk in tl.static_range(CHUNKS):
        active = _active(x, x_stride, thresholds, active_set, phases, t, first + chunk * CHUNK + k, d)
        words = words + (tl.sum(active.to(tl.int64) << k.to(tl.int64), 0),)
    return words


@triton.jit
def _bits(words, start, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Those of ROWS channels from `start` on, all in one chunk."""
    word = words[0]
    for chunk in tl.static_range(1, len(words)):
        word = tl.where(start >= chunk * CHUNK, words[chunk], word)
    return ((word >> (start % CHUNK + tl.arange(0, ROWS)).to(tl.int64)) & 1) != 0


@triton.jit
def _count_of(x, x_stride, thresholds, counters, phases, d, T: tl.constexpr, BLOCK: tl.constexpr):
    """counters += (generated tokens, their active channels)."""
    tokens = tl.full([], 0, tl.int64)
    active = tl.full([], 0, tl.int64)
    for t in tl.static_range(T):
        found = tl.zeros([BLOCK], tl.int32)
        strange = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, d, BLOCK, num_stages=3):
            i = start + tl.arange(0, BLOCK)
            xv = tl.load(x + t * x_stride + i, mask=i < d, other=0.0).to(tl.float32)
            above = _decided(xv, tl.load(thresholds + i, mask=i < d, other=0.0))
            found += ((i < d) & above).to(tl.int32)
            strange += (~(tl.abs(xv) < float("inf"))).to(tl.int32)
        n = tl.where(tl.sum(strange, 0) > 0, d, tl.sum(found, 0)).to(tl.int64)
        one = tl.full([], 1, tl.int64)
        if phases is not None:
            one = (tl.load(phases + t) == GENERATED).to(tl.int64)
        tokens += one
        active += n * one
    tl.atomic_add(counters, tokens, sem="relaxed")
    tl.atomic_add(counters + 1, active, sem="relaxed")


@triton.jit
def _sums(
    x, x_stride, w, stride, c, inside, thresholds, active_set, phases, first, d,
    LOAD: tl.constexpr, T: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Σ over active channels of the chunks from `first` on, float32 [columns] for each token."""
    words = ()
    sums = ()
    for t in tl.static_range(T):
        words = words + (_words(x, x_stride, thresholds, active_set, phases, t, first, d, CHUNKS, CHUNK),)
        sums = sums + (tl.zeros(c.shape, tl.float32),)
    for start in tl.range(0, CHUNKS * CHUNK, ROWS, num_stages=STAGES):
        i = first + start + tl.arange(0, ROWS)
        needed = _bits(words[0], start, ROWS, CHUNK)
        for t in tl.static_range(1, T):
            needed = needed | _bits(words[t], start, ROWS, CHUNK)
        rows = LOAD((None, w, stride), i, c, needed[:, None] & inside[None, :]).to(tl.float32)
        more = ()
        for t in tl.static_range(T):
            xv = tl.load(x + t * x_stride + i, mask=_bits(words[t], start, ROWS, CHUNK), other=0.0).to(tl.float32)
            more = more + (sums[t] + tl.sum(rows * xv[:, None], 0),)
        sums = more
    return sums


@triton.jit
def sum_channels(
    x, x_stride, weights, thresholds, active_set, phases, counters, partial, h0, h1, h2, tiles, d,
    LOAD: tl.constexpr, COUNTING: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Σ over the active channels of this program's chunks, for its tile of columns.

    x [T, d], three weights and how far their rows are apart, three thresholds [d] (or one active_set [T, d] int8) →
    partial [splits, T, h0 + h1 + h2] float32. The first COUNTING programs count instead, one a linear: three counters.
    """
    begin(PDL)
    program = tl.program_id(0) - COUNTING
    if COUNTING > 0:
        if program < 0:
            place = program + COUNTING
            own = _one_of(place, thresholds[0], thresholds[1], thresholds[2])
            counter = _one_of(place, counters[0], counters[1], counters[2])
            _count_of(x, x_stride, own, counter, phases, d, T, BLOCK)
    if program >= 0:
        # Neighbours read neighbouring columns of the same rows.
        member, tile, offset = _place(program % tiles, h0, h1, COLUMNS)
        w = _one_of(member, weights[0], weights[1], weights[2])
        stride = _one_of(member, weights[3], weights[4], weights[5])
        limits = None
        if active_set is None:
            limits = _one_of(member, thresholds[0], thresholds[1], thresholds[2])
        h = _one_of(member, h0, h1, h2)
        split = program // tiles
        c = tile * COLUMNS + tl.arange(0, COLUMNS)
        sums = _sums(
            x, x_stride, w, stride, c, c < h, limits, active_set, phases, split * CHUNKS * CHUNK, d,
            LOAD, T, CHUNKS, CHUNK, ROWS, STAGES,
        )  # fmt: skip
        total = h0 + h1 + h2
        for t in tl.static_range(T):
            to = partial + (split * T + t) * total + offset
            tl.store(to + c, sums[t], mask=c < h, eviction_policy="evict_last")


@triton.jit
def finish(
    partial, biases, y, h0, h1, h2, splits, tokens, HAS_BIAS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """partial [splits, tokens, h0 + h1 + h2] → y [tokens, h0 + h1 + h2], added in order."""
    member, tile, offset = _place(tl.program_id(0), h0, h1, COLUMNS)
    t = tl.program_id(1)
    h = _one_of(member, h0, h1, h2)
    c = tile * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, P)
    total = h0 + h1 + h2
    begin(PDL)
    v = tl.load(
        partial + (p[:, None] * tokens + t) * total + offset + c[None, :],
        mask=(p < splits)[:, None] & (c < h)[None, :], other=0.0, eviction_policy="evict_last",
    )  # fmt: skip
    z = tl.sum(v, 0)
    if HAS_BIAS:
        z = add_bias(z, _one_of(member, biases[0], biases[1], biases[2]), c, c < h)
    tl.store(y + t * total + offset + c, z.to(y.dtype.element_ty), mask=c < h)


@triton.jit
def select_channels(
    x, x_stride, thresholds, phases, active_set, d, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Which channels each token needs: active_set [T, d] int8, a program a token."""
    t = tl.program_id(0)
    begin(PDL)
    strange = tl.zeros([BLOCK], tl.int32)
    for start in range(0, d, BLOCK):
        i = start + tl.arange(0, BLOCK)
        xv = tl.load(x + t * x_stride + i, mask=i < d, other=0.0).to(tl.float32)
        strange += (~(tl.abs(xv) < float("inf"))).to(tl.int32)
    whole = tl.sum(strange, 0) > 0
    for start in range(0, d, BLOCK):
        i = start + tl.arange(0, BLOCK)
        xv = tl.load(x + t * x_stride + i, mask=i < d, other=0.0).to(tl.float32)
        active = is_above(xv, tl.load(thresholds + i, mask=i < d, other=0.0)) | whole
        if phases is not None:
            active = in_phase(active, tl.load(phases + t))
        tl.store(active_set + t * d + i, active.to(tl.int8), mask=i < d)
