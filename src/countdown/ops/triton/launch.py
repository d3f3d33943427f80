"""Launch shapes from a small model of the hardware.

Decoding is bound by memory, so a launch wants two things: enough bytes under way in every multiprocessor to cover the
latency of memory, and few partial sums, which are written and read again. A block of rows is 32 KB, a gather 16 KB of
each matrix, with two of them under way behind the one that is computed; two programs a multiprocessor leave room for
the next kernel to start early. Measured on one H200 over the grid of programs, rows, stages and warps around these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from countdown.weights.symmetric import group_of, padded

T = TypeVar("T")

# Rows up to this width are summed for two tokens at once in registers, with a proxy, in float32 or where the active set
# is given; two tokens otherwise, and more, go through matrix instructions.
PAIR_WIDTH = 4096
# Tokens are padded to the side of a matrix instruction.
TILE_TOKENS = 16
# Channels of a linear whose active set is a word.
CHUNK = 64
_KB = 1024


@dataclass(frozen=True)
class Hardware:
    """What launches depend on.

    Args:
        multiprocessors: How many the device has.
        shared: Bytes of shared memory that a program can have.
        dependent_launch: Whether a kernel may start before the one before it ends.
        dot4: Whether there is an instruction for four products of bytes.
        tf32: Whether there are matrix instructions for float32 with a short mantissa.
    """

    multiprocessors: int
    shared: int
    dependent_launch: bool
    dot4: bool
    tf32: bool

    @property
    def precision(self) -> str:
        """How float32 goes through matrix products: in three of short mantissas, 2^-21 exact, or one by one."""
        return "tf32x3" if self.tf32 else "ieee"


# Where kernels run without a device, in Triton's interpreter: few programs, as each is run in Python.
INTERPRETED = Hardware(multiprocessors=2, shared=64 * 1024, dependent_launch=False, dot4=False, tf32=False)


@cache
def hardware(device: torch.device) -> Hardware:
    """Return what `device` offers."""
    if device.type != "cuda":
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    # ROCm has one limit, CUDA a larger one that a kernel must ask for, as Triton does.
    shared = getattr(found, "shared_memory_per_block_optin", 0) or found.shared_memory_per_block
    cuda = bool(torch.version.cuda)
    major = found.major if cuda else 0
    return Hardware(found.multi_processor_count, shared, major >= 9, dot4=major >= 7, tf32=major >= 8)


@dataclass(frozen=True)
class Launch:
    """Grid, constants and options of one kernel.

    Args:
        grid: Programs.
        constants: Its `tl.constexpr` arguments.
        warps: Warps of a program.
        fused: Whether a product and the sum that it goes into may be rounded once. Not where a sum across threads
            begins with products: each of two threads would round its own once and the other's twice, and which of the
            two results is stored is left to chance.
    """

    grid: tuple[int, ...]
    constants: dict[str, Any]
    warps: int
    fused: bool = True

    def options(self, found: Hardware) -> dict[str, Any]:
        """Return the keyword arguments of the launch."""
        # Not given unless used: Triton for other vendors does not know it.
        dependent = {"launch_pdl": True} if found.dependent_launch else {}
        apart = {} if self.fused else {"enable_fp_fusion": False}
        return {**self.constants, "PDL": found.dependent_launch, "num_warps": self.warps, **dependent, **apart}


def on_its_device(op: Callable[..., T]) -> Callable[..., T]:
    """Decorator: launch where the first argument is; Triton launches on the current device."""

    @wraps(op)
    def on_device(x: Tensor, *args: Any, **kwargs: Any) -> T:
        if not x.is_cuda:
            return op(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return op(x, *args, **kwargs)

    return on_device


def listed(d: int, h: int, itemsize: int, found: Hardware) -> Launch:
    """Return the launch of `sum_listed`."""
    width, row = _row(d, itemsize)
    programs = min(found.multiprocessors, h)
    gather = _clamp(8 * _KB // row, 1, 8)
    constants = {
        "D": width,
        "GATHER": gather,
        "MINE": _power(_ceil(h, programs)),
        "GATHER_STAGES": _stages(3 * gather * row, 4, min(found.shared, 108 * _KB)),
    }
    return Launch((programs,), constants, _warps(width))


def row_blocks(
    d: int,
    h: int,
    itemsize: int,
    tokens: int,
    expected: int,
    found: Hardware,
    *,
    read: int | None = None,
    looks: int = 1,
) -> Launch | None:
    """Return the launch of `decide_and_sum`, None where registers do not hold that many tokens of this width.

    Args:
        d, h, itemsize: Sizes of the FFN, and bytes of an entry of its weights.
        tokens: In the call.
        expected: About how many neurons are active.
        found: Where.
        read: Bytes that are read of a neuron to decide on it; None for a row of one weight, whose product is kept.
        looks: One or two; of two, each of the matrices that are left is gathered alone.
    """
    width, row = _row(d, itemsize)
    if tokens > 2 or (tokens == 2 and width > PAIR_WIDTH):
        return None
    # Two tokens hold more in registers; one whose factor is known has a third less to gather.
    block = 16 if tokens == 2 and read is None else 32
    budget, matrices = (16, 2) if tokens == 1 and read is None else (8, 3)
    if looks == 2:
        budget, matrices = 2 * budget, 1
    stages = 3 if tokens == 1 else 4
    read = row if read is None else read
    rows = _clamp(block * _KB // read, 1, 16)
    programs, mine = _shared_out(h, rows, found)
    gather = _clamp(min(budget * _KB // row, _power(_ceil(expected, programs))), 1, 8)
    constants = {
        "T": tokens,
        "D": width,
        "ROWS": rows,
        "GATHER": gather,
        "MINE": _power(mine),
        "STAGES": _of_two(rows * read, _stages(rows * read, stages, found.shared // 2), found),
        "GATHER_STAGES": _stages(matrices * gather * row, stages, found.shared // 2),
    }
    return Launch((programs,), constants, _warps(width))


def _of_two(size: int, stages: int, found: Hardware) -> int:
    """Return so many stages that two programs fit a multiprocessor and no third, where blocks are large enough.

    Where small kernels around let this one start while their programs still run, some multiprocessors are taken, and
    the others would get three. So would they of the next sum, if `reduce` begins early.
    """
    if not found.dependent_launch or size < 8 * _KB:
        return stages
    while 3 * (stages - 1) * size <= found.shared and 2 * stages * size < found.shared:
        stages += 1
    return stages


def row_selection(h: int, tokens: int, read: int, found: Hardware) -> Launch:
    """Return the launch of `select_rows`, which reads so many bytes of a neuron."""
    rows = _clamp(32 * _KB // read, 1, 16)
    programs, _ = _shared_out(h, rows, found)
    return Launch((programs,), {"T": tokens, "ROWS": rows, "STAGES": _stages(rows * read, 3, found.shared // 2)}, 4)


def packed(d: int, found: Hardware) -> tuple[int, int, int, bool]:
    """Return what `deciders.quantised` needs to know of rows of d in 4 bits."""
    words = padded(d, 4) // 8
    return words, _power(words), group_of(d, 4) // 8, found.dot4


def quantisation(d: int, tokens: int, found: Hardware) -> Launch:
    """Return the launch of `quantise_tokens`."""
    return Launch((tokens,), {"HOW": packed(d, found)}, 8)


def _shared_out(h: int, rows: int, found: Hardware) -> tuple[int, int]:
    """Return how many programs share h rows in blocks, and the most rows that one has."""
    programs = min(2 * found.multiprocessors, _ceil(h, rows))
    return programs, _ceil(_ceil(h, rows), programs) * rows


def projection(d: int, heights: list[int], itemsize: int, found: Hardware, *, together: int = 1) -> Launch:
    """Return the launch of `project`, of matrices with so many rows; or of `gated`, of two `together`."""
    block = _clamp(_power(d), 16, (8 if d % (8 * _KB // itemsize) == 0 else 4) * _KB // itemsize)
    rows = _clamp(16 * _KB // (together * block * itemsize), 1, 16)
    constants = {"ROWS": rows, "BLOCK": block, "STAGES": 1}
    if d > block:
        constants["STAGES"] = _stages(together * rows * block * itemsize, 3, found.shared // 2)
    return Launch((sum(_ceil(h, rows) for h in heights),), constants, 4)


def normalisation(rows: int, d: int) -> Launch:
    """Return the launch of `normalise`."""
    width = max(_power(d), 16)
    return Launch((rows,), {"N": width}, _clamp(width // 512, 1, 16))


def attention(length: int, queries: int, size: int) -> Launch:
    """Return the launch of `attend_block` without its groups: `queries` of `size` share a group's keys."""
    half = max(_power(_ceil(size, 2)), 16)
    constants = {"R": max(_power(queries), TILE_TOKENS), "H": half, "BLOCK": _clamp(4096 // half, 16, 64)}
    return Launch((_ceil(length, constants["BLOCK"]),), constants, 4)


def combination(blocks: int, block: Launch) -> Launch:
    """Return the launch of `attend_all` after so many programs of `attend_block`."""
    some = _clamp(_power(blocks), 1, 32)
    constants = {"R": block.constants["R"], "N": 2 * block.constants["H"], "S": some, "MORE": blocks > some}
    return Launch((1,), constants, 4)


def angles(n: int) -> Launch:
    """Return the launch of `angles_one`."""
    return Launch((1,), {"N": _power(n)}, 1)


def largest(n: int) -> Launch:
    """Return the launch of `largest_of_block`."""
    block = _clamp(_power(n), 16, 1024)
    return Launch((_ceil(n, block),), {"BLOCK": block}, 4)


def largest_of_all(blocks: int) -> Launch:
    """Return the launch of `largest_of_all` after so many programs of `largest_of_block`."""
    return Launch((1,), {"BLOCKS": _power(blocks)}, 4)


def drawing(n: int) -> Launch:
    """Return the launch of `narrow`: in so many programs that one can add up what all of them leave."""
    block = _clamp(_power(_ceil(n, 256)), 1024, 1 << 30)
    blocks = _ceil(n, block)
    return Launch((blocks,), {"BLOCK": block, "SOME": 128, "BLOCKS": _power(blocks)}, 4)


def of_blocks(searched: Launch) -> Launch:
    """Return the launch of `largest_of_block` before `narrow`, of the same blocks."""
    return Launch(searched.grid, {"BLOCK": searched.constants["BLOCK"]}, searched.warps)


def drawn(searched: Launch) -> Launch:
    """Return the launch of `draw_of_block` after `narrow`, of the same blocks."""
    return Launch(searched.grid, {name: searched.constants[name] for name in ("BLOCK", "BLOCKS")}, searched.warps)


def tiled(d: int, h: int, itemsize: int, found: Hardware, *, mixed: bool = False) -> Launch:
    """Return the launch of `coefficients`; mixed: of weights and tokens that differ in dtype."""
    rows = 64 if h >= 64 * found.multiprocessors else 32
    block = _clamp(_power(d), 16, 256 // itemsize)
    stages = _stages((rows + TILE_TOKENS) * block * (4 if mixed else itemsize), 4, found.shared)
    constants = {"T": TILE_TOKENS, "ROWS": rows, "BLOCK": block, "STAGES": stages, "PRECISION": found.precision}
    return Launch((_ceil(h, rows),), constants, 4)


def columns(d: int, h: int, itemsize: int, found: Hardware, *, mixed: bool = False) -> tuple[Launch, int]:
    """Return the launch of `sum_columns`, and how many neurons each program sums; see `tiled`."""
    width = _clamp(_power(d), 16, 1024 // itemsize)
    rows = 16
    tiles = _ceil(d, width)
    groups = min(_ceil(h, rows), max(1, 4 * found.multiprocessors // tiles))
    each = _ceil(_ceil(h, rows), groups) * rows
    stages = _stages(rows * (width + 2 * TILE_TOKENS) * itemsize, 3, found.shared)
    # In float32 Triton 3.6 pipelined the loop wrongly.
    stages = stages if itemsize == 2 and not mixed else 1
    constants = {"T": TILE_TOKENS, "ROWS": rows, "COLUMNS": width, "STAGES": stages, "PRECISION": found.precision}
    return Launch((tiles, _ceil(h, each)), constants, 4), each


@dataclass(frozen=True)
class Channels:
    """The launch of `sum_channels`: its tiles of columns, and into how many parts the channels are split; of low ranks,
    the same.
    """

    launch: Launch
    tiles: int
    splits: int
    low_tiles: int
    low_splits: int


def channels(d: int, heights: list[int], ranks: list[int], itemsize: int, tokens: int, found: Hardware) -> Channels:
    """Return the launch for linears with so many outputs, and low ranks if any.

    Wide tiles, so that the rows of a block are added within a thread and no sum runs across warps; but not wider than
    the smallest linear. About as many programs as run at once: what is left over would take as long as all the others.
    Where programs are short, what they begin with counts, and fewer of them with less on its way are faster.
    """
    short = max(sum(heights), d) < 8192
    widest = 2048 if tokens <= 2 else 1024
    width = min(_power(max(heights)), _clamp(_power(min(heights)), 1024, widest))
    width = max(width, 16)
    tiles = sum(_ceil(height, width) for height in heights)
    low_width = _clamp(_power(max(ranks, default=1)), 16, 256)
    low_each = (4 if short else 8) * CHUNK
    low_tiles, low_splits = sum(_ceil(rank, low_width) for rank in ranks), _ceil(d, low_each)
    # Five programs fit where they hold little; but more than 256 partial sums cost `finish` what they save.
    light = tokens == 1 and not ranks and not short and 5 * found.multiprocessors <= 256 * tiles
    programs = (3 if short else 5 if light else 4) * found.multiprocessors
    room = programs if short else programs - low_tiles * low_splits
    step = 16 if short else 8
    each = _ceil(_ceil(d, max(1, room // tiles)), step) * step
    each = _clamp(each, 16, 8 * CHUNK)
    rows = _clamp(16 * _KB // (width * itemsize), 1, step)
    constants = {
        "T": tokens,
        "COLUMNS": width,
        "EACH": each,
        "ROWS": rows,
        "STAGES": _stages(rows * width * itemsize, 3 if short or light else 4, found.shared // 2),
        "LOW_COLUMNS": low_width,
        "LOW_EACH": low_each,
        "LOW_ROWS": _clamp(4096 // low_width, 4, CHUNK),
        "CHUNK": CHUNK,
    }
    splits = _ceil(d, each)
    grid = (tiles * splits + low_tiles * low_splits,)
    return Channels(Launch(grid, constants, 4), tiles, splits, low_tiles, low_splits)


def channel_selection(d: int, tokens: int) -> Launch:
    """Return the launch of `select_channels`."""
    return Launch((tokens,), {"BLOCK": _clamp(_power(d), 16, 1024)}, 4)


def finish(d: int, heights: list[int], ranks: list[int], form: Channels, tokens: int, *, counting: bool) -> Launch:
    """Return the launch of `finish` after one of `sum_channels`."""
    # A tile of partial sums of a low rank must fit the registers.
    parts = _power(form.low_splits)
    rank = _clamp(_power(max(ranks, default=1)), 16, _clamp(8 * _KB // parts, 16, 64))
    # In one piece, so that all of a token is on its way at once.
    block = _clamp(_power(d), 16, 16 * _KB)
    constants = {"P": _power(form.splits), "COLUMNS": 32, "LOW_P": parts, "RANK": rank, "BLOCK": block}
    constants["COUNTING"] = len(heights) if counting else 0
    grid = (constants["COUNTING"] + sum(_ceil(height, 32) for height in heights), tokens)
    return Launch(grid, constants, 4, fused=not ranks)


def reduction(
    d: int, programs: int, tokens: int, how: tuple[int, int, int, bool] | None = None, *, early: bool = False
) -> Launch:
    """Return the launch of `reduce`; of what is predicted with the rows that registers hold, `packed` like this.

    early: It comes after `decide_and_sum`, of which no third program fits.
    """
    columns = 32 if how is None else _clamp(16384 // how[1], 1, 32)
    constants = {"P": _power(programs), "COLUMNS": columns, "HOW": how, "EARLY": early}
    return Launch((_ceil(d, columns), tokens), constants, 8)


def _row(d: int, itemsize: int) -> tuple[int, int]:
    width = max(_power(d), 16)
    return width, width * itemsize


def _warps(width: int) -> int:
    # As few as registers allow: a sum over a row waits for all warps, and two programs must fit a multiprocessor.
    return _clamp(width // (2 * _KB), 4, 16)


def _stages(size: int, most: int, room: int) -> int:
    # All stages but the one that is computed have a buffer; some room is left for what else a program shares.
    return _clamp(1 + (room - 4 * _KB) // size, 1, most)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
