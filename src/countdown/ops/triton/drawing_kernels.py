"""Kernels that draw a token from logits; see `ops.drawing`.

What is left of top-k or top-p is all from some logit on. That is searched for by its bits, six at a time: each program
sums up its block's tokens by the next six bits of those that begin as was found before, and the next kernel finds out
from all blocks' sums with which bits to go on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.dense_kernels import rank_of
from countdown.ops.triton.kernel_parts import start_small

BINS = tl.constexpr(64)


@triton.jit
def _key(v):
    """An unsigned integer for each value, the larger the larger that is."""
    return rank_of(v).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _largest(ranks, blocks, BLOCKS: tl.constexpr):
    """The largest logit, of what `largest_of_block` found."""
    p = tl.arange(0, BLOCKS)
    rank = tl.max(tl.load(ranks + p, mask=p < blocks, other=-0x7FFFFFFF), 0)
    bits = tl.where(rank < 0, (-rank) | -0x80000000, rank)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _narrowed(sums, state, shift, blocks, BLOCKS: tl.constexpr):
    """Where the search goes on after `narrow`: from which key, and what is still to be found below it.

    The largest bin that, with those above it, has what is looked for.
    """
    low = tl.load(state).to(tl.uint32, bitcast=True)
    wanted = tl.load(state + 1).to(tl.float32, bitcast=True)
    is_share = tl.load(state + 2)
    p = tl.arange(0, BLOCKS)
    b = tl.arange(0, BINS)
    of_blocks = tl.load(sums + p[:, None] * BINS + b[None, :], mask=(p < blocks)[:, None], other=0.0)
    own = tl.sum(of_blocks, 0)
    wanted = tl.where(is_share != 0, wanted * tl.sum(own, 0), wanted)
    above = tl.cumsum(own, 0, reverse=True)
    found = tl.max(tl.where((above >= wanted) & (own > 0), b, 0), 0)
    before = tl.sum(tl.where(b > found, own, 0.0), 0)
    return low + (found.to(tl.uint32) << shift.to(tl.uint32)), wanted - before


# Triton compiles anew for integers that 16 divides, and for 1.
@triton.jit(do_not_specialize=["shift"])
def narrow(
    logits, ranks, sums_before, sums, state, shift, wanted, temperature, n, blocks,
    STARTS: tl.constexpr, BY_MASS: tl.constexpr, BLOCK: tl.constexpr, SOME: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sums [blocks, 64] of the tokens of each block by the six bits of their keys from `shift` on.

    STARTS: a search begins, for what is `wanted`: so many tokens, or BY_MASS that share of the probability, among those
    that the last search has found. state [5]: key and amount that the search goes on with, whether that is a share,
    the least key that counts, for the kernel after this one in the next 5.
    """
    p = tl.program_id(0)
    start_small(True, PDL)
    least = tl.zeros([], tl.uint32)
    low = tl.zeros([], tl.uint32)
    amount = tl.full([], wanted, tl.float32)
    if sums_before is not None:
        least = tl.load(state + 3).to(tl.uint32, bitcast=True)
        low, left = _narrowed(sums_before, state, tl.load(state + 4), blocks, BLOCKS)
        if STARTS:
            least = low
            low = tl.zeros([], tl.uint32)
        else:
            amount = left
    if p == 0:
        tl.store(state + 5, low.to(tl.int32, bitcast=True))
        tl.store(state + 6, amount.to(tl.int32, bitcast=True))
        tl.store(state + 7, 1 if STARTS and BY_MASS else 0)
        tl.store(state + 8, least.to(tl.int32, bitcast=True))
        tl.store(state + 9, shift)
    most = _largest(ranks, blocks, BLOCKS)
    b = tl.arange(0, BINS).to(tl.uint32)
    # Across threads it is added once, at the end; unrolled, so that all logits are on their way at once.
    own = tl.zeros([BINS, SOME], tl.float32)
    for first in tl.static_range(0, BLOCK, SOME):
        i = p * BLOCK + first + tl.arange(0, SOME)
        v = tl.load(logits + i, mask=i < n, other=float("-inf")).to(tl.float32)
        key = _key(v)
        weight = tl.where((i < n) & (key >= low) & (key >= least), 1.0, 0.0)
        if BY_MASS:
            weight *= tl.exp((v - most) / temperature)
        bin_of = (key - low) >> shift.to(tl.uint32)
        own += tl.where(bin_of[None, :] == b[:, None], weight[None, :], 0.0)
    tl.store(sums + p * BINS + tl.arange(0, BINS), tl.sum(own, 1))


@triton.jit
def _exponential(seed, i):
    """Exponentials [n] of 32 random bits each; the small ones are exact."""
    v = (tl.randint(seed, i).to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = tl.minimum(v, 0.99999994)  # the last below 1, of which the exponential is finite
    return tl.where(v < 0.01, v * (1 + v * (0.5 + v * (0.3333333333333333 + v * 0.25))), -tl.log(1 - v))


@triton.jit(do_not_specialize=["seed"])
def draw_of_block(
    logits, ranks, sums_before, state, seed, temperature, floor, largest, ranks_drawn, places, n, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rank and place of the largest logit with noise in each block, of those that are left; and the largest logit.

    floor: how far below the largest, in logits over temperature, one may be.
    """
    p = tl.program_id(0)
    i = p * BLOCK + tl.arange(0, BLOCK)
    start_small(True, PDL)
    most = _largest(ranks, blocks, BLOCKS)
    v = tl.load(logits + i, mask=i < n, other=float("-inf")).to(tl.float32)
    scaled = (v - most) / temperature
    kept = (i < n) & (scaled >= floor)
    if sums_before is not None:
        least = tl.load(state + 3).to(tl.uint32, bitcast=True)
        low, _ = _narrowed(sums_before, state, tl.load(state + 4), blocks, BLOCKS)
        key = _key(v)
        kept = kept & (key >= low) & (key >= least)
    drawn = tl.where(kept, scaled - tl.log(_exponential(seed, i)), float("-inf"))
    # Not numbers are drawn before all others, so that somebody sees them.
    rank = rank_of(tl.where((i < n) & (v != v), v, drawn))
    highest = tl.max(rank, 0)
    tl.store(ranks_drawn + p, highest)
    tl.store(places + p, tl.min(tl.where((rank == highest) & (i < n), i, n - 1), 0))
    if p == 0:
        tl.store(largest, most)
