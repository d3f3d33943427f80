"""The op that draws a token, on a device that Triton compiles for; see `ops.drawing`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from countdown.ops import drawing as reference
from countdown.ops.base import Gathering
from countdown.ops.request import requested
from countdown.ops.triton import dense_kernels, drawing_kernels, launch

BITS = 6
# Of the bits of a logit in float32, those that are 0 of a value in a shorter dtype.
EMPTY = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
_STATE = 5


@launch.on_its_device
def draw_one(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return a token `[1, 1]` and the largest logit `[1]`; see `ops.drawing`."""
    reference.check_draw(logits, temperature, top_k, top_p, min_p)
    if logits.dtype not in Gathering.dtypes or requested() == "reference":
        return reference.draw_one(logits, temperature, top_k, top_p, min_p, seed)
    # Launched between the graphs of steps, which are slower behind launches that depend on the one before.
    found = replace(launch.hardware(logits.device), dependent_launch=False)
    logits, n = logits.contiguous(), logits.shape[1]
    config = launch.drawing(n)
    (blocks,) = config.grid
    ranks, places = logits.new_empty((2, blocks), dtype=torch.int32)
    dense_kernels.largest_of_block[config.grid](logits, ranks, places, n, **launch.of_blocks(config).options(found))
    # Of each search: what is wanted, and whether it is a share of the probability.
    searches = [(float(top_k), False)] * (0 < top_k < n) + [(top_p, True)] * (top_p < 1)
    shifts = range(EMPTY[logits.dtype], 32, BITS)[::-1]
    levels = [(shift, *search, shift == shifts[0]) for search in searches for shift in shifts]
    sums = logits.new_empty((len(levels), blocks, 1 << BITS), dtype=torch.float32)
    state = logits.new_empty((len(levels) + 1, _STATE), dtype=torch.int32)
    before = None
    for level, (shift, wanted, by_mass, starts) in enumerate(levels):
        drawing_kernels.narrow[config.grid](
            logits, ranks, before, sums[level], state[level], shift, wanted, temperature, n, blocks,
            STARTS=starts, BY_MASS=by_mass, **config.options(found),
        )  # fmt: skip
        before = sums[level]
    most = logits.new_empty(1, dtype=torch.float32)
    ranks_drawn = torch.empty_like(ranks)
    floor = math.log(min_p) if min_p > 0 else float("-inf")
    drawing_kernels.draw_of_block[config.grid](
        logits, ranks, before, state[-1], seed, temperature, floor, most, ranks_drawn, places, n, blocks,
        **launch.drawn(config).options(found),
    )  # fmt: skip
    token = logits.new_empty((1, 1), dtype=torch.int64)
    last = launch.largest_of_all(blocks)
    dense_kernels.largest_of_all[last.grid](ranks_drawn, places, token, blocks, n, **last.options(found))
    return token, most


# By name, for the backend.
OPS = {"draw_one": draw_one}
