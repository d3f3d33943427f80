"""Kernels of sparse linears, z = Σ_j x_j W[:, j] over active input channels j, for 1 to 8 tokens.

Letters as in `ops.call`: T tokens, d input channels. Weights are laid out by channel, so that what a channel is
multiplied with lies in a row. Up to three linears that read the same x, each with thresholds of its own, are one
launch: their outputs stand side by side, h0 + h1 + h2 of them.

A program takes a tile of columns and a few chunks of 64 channels. Which channels of a chunk a token needs becomes the
bits of a word, so that the addresses of rows follow from registers, and rows to come are on their way while those
before are added. Rows that no token needs are not read; the others are read once for all tokens. Programs leave partial
sums that `finish` adds in a fixed order: the same bits every time.

Where a low rank stands for dropped channels, z += A (B (x ⊙ ¬m)), the columns of B are rows of up to three more
matrices, whose programs read what the others leave out. They are small, so a program takes more chunks and leaves fewer
partial sums; each program of `finish` adds them all and multiplies them with its rows of A.

Thresholds are loaded before a program waits for the kernel before it: no kernel writes them that runs in one queue with
these.

Of a token that is not finite every channel is active by definition. Here its channels that are not finite are, which
makes the same result where weights are finite and sums of what is finite do not overflow: no other sum with an infinity
in it depends on what else is finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.kernel_parts import (
    GENERATED,
    PADDING,
    add_bias,
    begin,
    in_phase,
    is_above,
)

# Marks the count of a token that is not finite; more than a program's channels.
STRANGE = tl.constexpr(1 << 16)


@triton.jit
def _place(tile, sizes, COLUMNS: tl.constexpr):
    """Which matrix a tile is of, which tile of that, and where its sums begin."""
    member = tl.full([], 0, tl.int32)
    first = tl.full([], 0, tl.int32)
    offset = tl.full([], 0, tl.int32)
    before = 0
    begins = 0
    for place in tl.static_range(len(sizes) - 1):
        before += tl.cdiv(sizes[place], COLUMNS)
        begins += sizes[place]
        later = tile >= before
        member += later.to(tl.int32)
        first = tl.where(later, before, first)
        offset = tl.where(later, begins, offset)
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
def _limits(thresholds, first, d, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Thresholds of the chunks from `first` on, float32 [CHUNK] each; none where there are active sets."""
    found = ()
    for chunk in tl.static_range(CHUNKS):
        if thresholds is None:
            found = found + (None,)
        else:
            i = first + chunk * CHUNK + tl.arange(0, CHUNK)
            found = found + (tl.load(thresholds + i, mask=i < d, other=0.0),)
    return found


@triton.jit
def _active(x, x_stride, limit, active_set, phases, DROPPED: tl.constexpr, t: tl.constexpr, i, d):
    """Whether token t needs channels i; or, if DROPPED, leaves them out."""
    here = i < d
    if active_set is None:
        active = _decided(tl.load(x + t * x_stride + i, mask=here, other=0.0).to(tl.float32), limit)
        if phases is not None:
            active = in_phase(active, tl.load(phases + t))
    else:
        active = tl.load(active_set + t * d + i, mask=here, other=0) != 0
    if DROPPED:
        active = ~active
        if phases is not None:
            active = active & (tl.load(phases + t) != PADDING)
    return here & active


@triton.jit
def _words(x, x_stride, limits, active_set, phases, DROPPED: tl.constexpr, t: tl.constexpr, first, d,
           CHUNK: tl.constexpr):  # fmt: skip
    """The channels that token t needs of each chunk, int64 with a bit for each."""
    k = tl.arange(0, CHUNK)
    words = ()
    for chunk in tl.static_range(len(limits)):
        i = first + chunk * CHUNK + k
        active = _active(x, x_stride, limits[chunk], active_set, phases, DROPPED, t, i, d)
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
def _leave_counts(x, x_stride, limits, counts, split, member, first, d, T: tl.constexpr, CHUNK: tl.constexpr):
    """How many channels of its chunks each token needs, plus STRANGE if one is not finite: int32 in counts [T, 3]."""
    for t in tl.static_range(T):
        n = tl.zeros([CHUNK], tl.int32)
        strange = tl.zeros([CHUNK], tl.int32)
        for chunk in tl.static_range(len(limits)):
            i = first + chunk * CHUNK + tl.arange(0, CHUNK)
            xv = tl.load(x + t * x_stride + i, mask=i < d, other=0.0).to(tl.float32)
            n += ((i < d) & _decided(xv, limits[chunk])).to(tl.int32)
            strange |= (~(tl.abs(xv) < float("inf"))).to(tl.int32)
        found = tl.sum(n, 0) + tl.where(tl.max(strange, 0) > 0, STRANGE, 0)
        tl.store(counts + (split * T + t) * 3 + member, found, eviction_policy="evict_last")


@triton.jit
def _add_counts(counts, counters, phases, member, splits, tokens, t, d, P: tl.constexpr):
    """counters += (1 if token t is a generated one, its active channels, which are all d if it is not finite)."""
    p = tl.arange(0, P)
    found = tl.load(counts + (p * tokens + t) * 3 + member, mask=p < splits, other=0)
    n = tl.where(tl.max(found, 0) >= STRANGE, d, tl.sum(found, 0))
    one = tl.full([], 1, tl.int64)
    if phases is not None:
        one = (tl.load(phases + t) == GENERATED).to(tl.int64)
    # Integers: the sum is the same in whatever order programs add.
    tl.atomic_add(counters, one, sem="relaxed")
    tl.atomic_add(counters + 1, n.to(tl.int64) * one, sem="relaxed")


@triton.jit
def _sums(
    x, x_stride, w, stride, c, inside, limits, active_set, phases, DROPPED: tl.constexpr, first, d,
    LOAD: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ over active channels of the chunks from `first` on, float32 [columns] for each token."""
    words = ()
    sums = ()
    for t in tl.static_range(T):
        words = words + (_words(x, x_stride, limits, active_set, phases, DROPPED, t, first, d, CHUNK),)
        sums = sums + (tl.zeros(c.shape, tl.float32),)
    for start in tl.range(0, len(limits) * CHUNK, ROWS, num_stages=STAGES):
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
def _store(partial, sums, split, total, offset, c, h):
    for t in tl.static_range(len(sums)):
        to = partial + (split * len(sums) + t) * total + offset
        tl.store(to + c, sums[t], mask=c < h, eviction_policy="evict_last")


@triton.jit
def sum_channels(
    x, x_stride, weights, inner, thresholds, active_set, phases, partial, low, counts, sizes, ranks, tiles, low_tiles,
    low_programs, d, LOAD: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, LOW_COLUMNS: tl.constexpr, LOW_CHUNKS: tl.constexpr, LOW_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Σ over the active channels of this program's chunks, for its tile of columns.

    x [T, d], three weights and how far their rows are apart, three thresholds [d] (or one active_set [T, d] int8) →
    partial [splits, T, Σ sizes] float32 and, unless None, counts [splits, T, 3]: see `_leave_counts`. The first
    programs are of three B, or None, which stand as the weights do: they sum over channels that are not active, →
    low [low splits, T, Σ ranks] float32.
    """
    program = tl.program_id(0)
    if inner is not None:
        if program < low_programs:
            member, tile, offset = _place(program % low_tiles, ranks, LOW_COLUMNS)
            w = _one_of(member, inner[0], inner[1], inner[2])
            stride = _one_of(member, inner[3], inner[4], inner[5])
            rank = _one_of(member, ranks[0], ranks[1], ranks[2])
            first = program // low_tiles * LOW_CHUNKS * CHUNK
            own = None
            if active_set is None:
                own = _one_of(member, thresholds[0], thresholds[1], thresholds[2])
            limits = _limits(own, first, d, LOW_CHUNKS, CHUNK)
            c = tile * LOW_COLUMNS + tl.arange(0, LOW_COLUMNS)
            begin(PDL)
            sums = _sums(
                x, x_stride, w, stride, c, c < rank, limits, active_set, phases, True, first, d,
                LOAD, T, CHUNK, LOW_ROWS, STAGES,
            )  # fmt: skip
            _store(low, sums, program // low_tiles, _total(ranks), offset, c, rank)
        program -= low_programs
    if program >= 0:
        # Neighbours read neighbouring columns of the same rows.
        member, tile, offset = _place(program % tiles, sizes, COLUMNS)
        w = _one_of(member, weights[0], weights[1], weights[2])
        stride = _one_of(member, weights[3], weights[4], weights[5])
        h = _one_of(member, sizes[0], sizes[1], sizes[2])
        split = program // tiles
        first = split * CHUNKS * CHUNK
        own = None
        if active_set is None:
            own = _one_of(member, thresholds[0], thresholds[1], thresholds[2])
        limits = _limits(own, first, d, CHUNKS, CHUNK)
        c = tile * COLUMNS + tl.arange(0, COLUMNS)
        begin(PDL)
        sums = _sums(
            x, x_stride, w, stride, c, c < h, limits, active_set, phases, False, first, d, LOAD, T, CHUNK, ROWS, STAGES
        )
        _store(partial, sums, split, _total(sizes), offset, c, h)
        if counts is not None:
            if tile == 0:
                _leave_counts(x, x_stride, limits, counts, split, member, first, d, T, CHUNK)


@triton.jit
def _total(sizes):
    return sizes[0] + sizes[1] + sizes[2]


@triton.jit
def _low_rank(low, outer, stride, c, inside, rank, first, total, splits, tokens, t,
              P: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    """Rows c of A times the sums of the rank that `first` and the entries after it hold, float32 [columns]."""
    p = tl.arange(0, P)
    z = tl.zeros(c.shape, tl.float32)
    for start in range(0, rank, RANK):
        k = start + tl.arange(0, RANK)
        sums = tl.load(
            low + (p[:, None] * tokens + t) * total + first + k[None, :],
            mask=(p < splits)[:, None] & (k < rank)[None, :], other=0.0, eviction_policy="evict_last",
        )  # fmt: skip
        rows = tl.load(outer + c[:, None] * stride + k[None, :], mask=inside[:, None] & (k < rank)[None, :], other=0.0)
        z += tl.sum(rows.to(tl.float32) * tl.sum(sums, 0)[None, :], 1)
    return z


@triton.jit
def finish(
    partial, low, outer, counts, counters, biases, phases, y, sizes, ranks, splits, low_splits, tokens, d,
    HAS_BIAS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, LOW_P: tl.constexpr, RANK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """partial [splits, tokens, Σ sizes], added in order, → y [tokens, Σ sizes].

    outer: three A that low [low_splits, tokens, Σ ranks] is multiplied with, and how far their rows are apart; or None.
    counts [splits, tokens, 3] are added to three counters, unless None.
    """
    member, tile, offset = _place(tl.program_id(0), sizes, COLUMNS)
    t = tl.program_id(1)
    h = _one_of(member, sizes[0], sizes[1], sizes[2])
    c = tile * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, P)
    total = _total(sizes)
    begin(PDL)
    v = tl.load(
        partial + (p[:, None] * tokens + t) * total + offset + c[None, :],
        mask=(p < splits)[:, None] & (c < h)[None, :], other=0.0, eviction_policy="evict_last",
    )  # fmt: skip
    z = tl.sum(v, 0)
    if outer is not None:
        matrix = _one_of(member, outer[0], outer[1], outer[2])
        stride = _one_of(member, outer[3], outer[4], outer[5])
        rank = _one_of(member, ranks[0], ranks[1], ranks[2])
        first = _one_of(member, 0, ranks[0], ranks[0] + ranks[1])
        z += _low_rank(low, matrix, stride, c, c < h, rank, first, _total(ranks), low_splits, tokens, t, LOW_P, RANK)
    if HAS_BIAS:
        z = add_bias(z, _one_of(member, biases[0], biases[1], biases[2]), c, c < h)
    tl.store(y + t * total + offset + c, z.to(y.dtype.element_ty), mask=c < h)
    if counts is not None:
        if tile == 0:
            own = _one_of(member, counters[0], counters[1], counters[2])
            _add_counts(counts, own, phases, member, splits, tokens, t, d, P)


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
