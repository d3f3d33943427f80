"""How a block of a weight becomes numbers in a kernel: one function a format, named in `ffn.FORMATS`.

A weight reaches a kernel as a tuple: one of these functions, then the pointers and numbers that it reads, so that a
kernel is compiled for each combination of formats and names none of them. A function takes that tuple, rows i [rows]
and columns c [columns] of the block and a mask [rows, columns] of what is read; it returns the entries [rows, columns],
0 where nothing is read, in whatever floating dtype is nearest: products are in float32 where dtypes differ.

A tuple with a function in it is passed on or indexed, and stands in no other tuple: Triton assigns none to a name, and
3.6 forgets the constants of a tuple inside of another.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plain(weight, i, c, mask):
    """Entries as they are. weight: the matrix, its entries of a row side by side, and how far rows are apart."""
    offsets = i[:, None].to(tl.int64) * weight[2] + c[None, :]
    return tl.load(weight[1] + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
