"""Kernels of sparse linears, z = Σ_j x_j W[:, j] over active input channels j, for 1 to 8 tokens.

Letters as in `ops.call`: T tokens, d input channels. Weights are laid out by channel, so that what a channel is
multiplied with lies in a row. Up to three linears that read the same x, each with thresholds of its own, are one
launch: their outputs stand side by side, h0 + h1 + h2 of them.

A program takes a tile of columns and some channels. Which of them a token needs becomes the bits of words, 64 in each,
so that the addresses of rows follow from registers, and rows to come are on their way while those before are added.
Rows that no token needs are not read; the others are read once for all tokens. Programs leave partial sums that
`finish` adds in a fixed order: the same bits every time.

Where a low rank stands for dropped channels, z += A (B (x ⊙ ¬m)), the columns of B are rows of up to three more
matrices, whose programs read what the others leave out. They are small, so a program takes more chunks and leaves fewer
partial sums; each program of `finish` adds them all and multiplies them with its rows of A.

Thresholds are loaded before a program waits for the kernel before it, which made the input: a module's are written when
it is made, or its sparsity set, and much runs between.

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
def _limits(thresholds, first, d, EACH: tl.constexpr, CHUNK: tl.constexpr):
    """Thresholds of EACH channels from `first` on, float32 [CHUNK] for each word."""
    found = ()
    for chunk in tl.static_range((EACH + CHUNK - 1) // CHUNK):
        i = first + chunk * CHUNK + tl.arange(0, CHUNK)
        found = found + (tl.load(thresholds + i, mask=i < d, other=0.0),)
    return found


@triton.jit
def _active(
    x, x_stride, limits, chunk: tl.constexpr, active_set, phases, DROPPED: tl.constexpr, t: tl.constexpr, i, stop, d
):
    """Whether token t needs channels i, those of a word; or, if DROPPED, leaves them out."""
    here = i < stop
    if active_set is None:
        active = _decided(tl.load(x + t * x_stride + i, mask=here, other=0.0).to(tl.float32), limits[chunk])
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
           EACH: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Which of EACH channels from `first` on token t needs, int64 with a bit for each."""
    k = tl.arange(0, CHUNK)
    stop = tl.minimum(first + EACH, d)
    words = ()
    for chunk in tl.static_range((EACH + CHUNK - 1) // CHUNK):
        i = first + chunk * CHUNK + k
        active = _active(x, x_stride, limits, chunk, active_set, phases, DROPPED, t, i, stop, d)
        words = words + (tl.sum(active.to(tl.int64) << k.to(tl.int64), 0),)
    return words


@triton.jit
def _bits(words, start, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Those of ROWS channels from `start` on, all in one word."""
    word = words[0]
    for chunk in tl.static_range(1, len(words)):
        word = tl.where(start >= chunk * CHUNK, words[chunk], word)
    return ((word >> (start % CHUNK + tl.arange(0, ROWS)).to(tl.int64)) & 1) != 0


@triton.jit
def _bits_set(word):
    """How many bits of an int64 are 1: counted in pairs, fours and eights side by side, which a product then adds."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (word * 0x0101010101010101) >> 56


@triton.jit
def _count_words(words, counters, phases, split):
    """counters += (generated tokens, once; their channels in these words)."""
    tokens = tl.full([], 0, tl.int64)
    active = tl.full([], 0, tl.int64)
    for t in tl.static_range(len(words)):
        n = tl.full([], 0, tl.int64)
        for chunk in tl.static_range(len(words[t])):
            n += _bits_set(words[t][chunk])
        one = tl.full([], 1, tl.int64)
        if phases is not None:
            one = (tl.load(phases + t) == GENERATED).to(tl.int64)
        tokens += one
        active += n * one
    # Integers: the sum is the same in whatever order programs add.
    tl.atomic_add(counters, tokens, mask=split == 0, sem="relaxed")
    tl.atomic_add(counters + 1, active, sem="relaxed")


@triton.jit
def _count_rest(x, x_stride, thresholds, counters, phases, t, d, BLOCK: tl.constexpr):
    """If token t is not finite, counters[1] += channels that were not counted as active, of which it has none."""
    strange = tl.full([], 0, tl.int32)
    for start in range(0, d, BLOCK):
        i = start + tl.arange(0, BLOCK)
        xv = tl.load(x + t * x_stride + i, mask=i < d, other=0.0).to(tl.float32)
        strange |= tl.max((~(tl.abs(xv) < float("inf"))).to(tl.int32), 0)
    if strange > 0:
        rest = tl.full([], 0, tl.int64)
        for start in range(0, d, BLOCK):
            i = start + tl.arange(0, BLOCK)
            xv = tl.load(x + t * x_stride + i, mask=i < d, other=0.0).to(tl.float32)
            small = ~_decided(xv, tl.load(thresholds + i, mask=i < d, other=0.0))
            rest += tl.sum(((i < d) & small).to(tl.int32), 0)
        if phases is not None:
            rest *= (tl.load(phases + t) == GENERATED).to(tl.int64)
        tl.atomic_add(counters + 1, rest, sem="relaxed")


@triton.jit
def _sums(
    x, x_stride, w, stride, c, inside, limits, active_set, phases, DROPPED: tl.constexpr, first, d,
    LOAD: tl.constexpr, T: tl.constexpr, EACH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """For each token, Σ over active channels among EACH from `first` on, float32 [columns]; and its words."""
    words = ()
    sums = ()
    for t in tl.static_range(T):
        words = words + (_words(x, x_stride, limits, active_set, phases, DROPPED, t, first, d, EACH, CHUNK),)
        sums = sums + (tl.zeros(c.shape, tl.float32),)
    for start in tl.range(0, EACH, ROWS, num_stages=STAGES):
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
    return sums, words


@triton.jit
def _store(partial, sums, split, total, offset, c, h):
    for t in tl.static_range(len(sums)):
        to = partial + (split * len(sums) + t) * total + offset
        tl.store(to + c, sums[t], mask=c < h, eviction_policy="evict_last")


@triton.jit
def sum_channels(
    x, x_stride, weights, inner, thresholds, active_set, phases, counters, partial, low, sizes, ranks, tiles, low_tiles,
    low_programs, d, LOAD: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr,
    ROWS: tl.constexpr, LOW_COLUMNS: tl.constexpr, LOW_EACH: tl.constexpr, LOW_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Σ over the active channels among EACH of this program, for its tile of columns.

    x [T, d], three weights and how far their rows are apart, three thresholds [d] (or one active_set [T, d] int8) →
    partial [splits, T, Σ sizes] float32. The first programs are of three B, or None, that stand as the weights do: they
    sum over those of LOW_EACH channels that are not active, → low [low splits, T, Σ ranks] float32. Three counters,
    or None; what they lack of a token that is not finite, `finish` adds.
    """
    program = tl.program_id(0)
    if inner is not None:
        if program < low_programs:
            member, tile, offset = _place(program % low_tiles, ranks, LOW_COLUMNS)
            w = _one_of(member, inner[0], inner[1], inner[2])
            stride = _one_of(member, inner[3], inner[4], inner[5])
            rank = _one_of(member, ranks[0], ranks[1], ranks[2])
            first = program // low_tiles * LOW_EACH
            limits = ()
            if active_set is None:
                own = _one_of(member, thresholds[0], thresholds[1], thresholds[2])
                limits = _limits(own, first, d, LOW_EACH, CHUNK)
            c = tile * LOW_COLUMNS + tl.arange(0, LOW_COLUMNS)
            begin(PDL)
            sums, _ = _sums(
                x, x_stride, w, stride, c, c < rank, limits, active_set, phases, True, first, d,
                LOAD, T, LOW_EACH, CHUNK, LOW_ROWS, STAGES,
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
        first = split * EACH
        limits = ()
        if active_set is None:
            own = _one_of(member, thresholds[0], thresholds[1], thresholds[2])
            limits = _limits(own, first, d, EACH, CHUNK)
        c = tile * COLUMNS + tl.arange(0, COLUMNS)
        begin(PDL)
        sums, words = _sums(
            x, x_stride, w, stride, c, c < h, limits, active_set, phases, False, first, d,
            LOAD, T, EACH, CHUNK, ROWS, STAGES,
        )  # fmt: skip
        if counters is not None:
            if tile == 0:
                _count_words(words, _one_of(member, counters[0], counters[1], counters[2]), phases, split)
        _store(partial, sums, split, _total(sizes), offset, c, h)


@triton.jit
def _total(sizes):
    return sizes[0] + sizes[1] + sizes[2]


@triton.jit
def _rows_of(outer, stride, c, inside, k, rank):
    """Rows c of A, its columns k."""
    return tl.load(outer + c[:, None] * stride + k[None, :], mask=inside[:, None] & (k < rank)[None, :], other=0.0)


@triton.jit
def _summed(partial, p, splits, tokens, t, total, c, inside):
    """Partial sums [splits, tokens, total] of token t, columns c, as they are: [P, columns]."""
    return tl.load(
        partial + (p[:, None] * tokens + t) * total + c[None, :],
        mask=(p < splits)[:, None] & inside[None, :], other=0.0, eviction_policy="evict_last",
    )  # fmt: skip


@triton.jit
def _times(rows, sums):
    return tl.sum(rows.to(tl.float32) * tl.sum(sums, 0)[None, :], 1)


@triton.jit
def _finish_tile(
    program, t, partial, low, outer, biases, y, sizes, ranks, splits, low_splits, tokens, HAS_BIAS: tl.constexpr,
    P: tl.constexpr, COLUMNS: tl.constexpr, LOW_P: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add a tile of columns of token t."""
    member, tile, offset = _place(program, sizes, COLUMNS)
    h = _one_of(member, sizes[0], sizes[1], sizes[2])
    c = tile * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, P)
    total = _total(sizes)
    if outer is not None:
        matrix = _one_of(member, outer[0], outer[1], outer[2])
        stride = _one_of(member, outer[3], outer[4], outer[5])
        rank = _one_of(member, ranks[0], ranks[1], ranks[2])
        first = _one_of(member, 0, ranks[0], ranks[0] + ranks[1])
        low_p = tl.arange(0, LOW_P)
        k = tl.arange(0, RANK)
        # Most ranks are one block: all that it takes is on its way before anything is added.
        rows = _rows_of(matrix, stride, c, c < h, k, rank)
    begin(PDL)
    v = _summed(partial, p, splits, tokens, t, total, offset + c, c < h)
    if outer is not None:
        sums = _summed(low, low_p, low_splits, tokens, t, _total(ranks), first + k, k < rank)
    z = tl.sum(v, 0)
    if outer is not None:
        z += _times(rows, sums)
        for start in range(RANK, rank, RANK):
            k = start + tl.arange(0, RANK)
            sums = _summed(low, low_p, low_splits, tokens, t, _total(ranks), first + k, k < rank)
            z += _times(_rows_of(matrix, stride, c, c < h, k, rank), sums)
    if HAS_BIAS:
        z = add_bias(z, _one_of(member, biases[0], biases[1], biases[2]), c, c < h)
    tl.store(y + t * total + offset + c, z.to(y.dtype.element_ty), mask=c < h)


@triton.jit
def finish(
    x, x_stride, thresholds, phases, counters, partial, low, outer, biases, y, sizes, ranks, splits, low_splits, tokens,
    d, HAS_BIAS: tl.constexpr, COUNTING: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, LOW_P: tl.constexpr,
    RANK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial [splits, tokens, Σ sizes], added in order, → y [tokens, Σ sizes].

    outer: three A that low [low_splits, tokens, Σ ranks] is multiplied with, and how far their rows are apart; or None.
    The first COUNTING programs count, one a linear: see `_count_rest`.
    """
    t = tl.program_id(1)
    program = tl.program_id(0) - COUNTING
    if COUNTING > 0:
        if program < 0:
            place = program + COUNTING
            own = _one_of(place, thresholds[0], thresholds[1], thresholds[2])
            begin(PDL)
            _count_rest(x, x_stride, own, _one_of(place, counters[0], counters[1], counters[2]), phases, t, d, BLOCK)
    if program >= 0:
        _finish_tile(
            program, t, partial, low, outer, biases, y, sizes, ranks, splits, low_splits, tokens,
            HAS_BIAS, P, COLUMNS, LOW_P, RANK, PDL,
        )  # fmt: skip


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
