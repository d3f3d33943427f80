"""R-Sparse's budget (arXiv 2504.19449, section 3): how many weights of a linear go into whole channels, how many into
a low-rank term. This file needs no torch.
"""

from __future__ import annotations

import math


def kept(d: int, sparsity: float, alpha: float) -> int:
    """Return c = ⌊d·(1 - sparsity)·α⌋, the input channels that are kept whole."""
    return _whole(d * (1 - sparsity) * alpha)


def rank(d: int, outputs: int, sparsity: float, alpha: float) -> int:
    """Return ⌊((1 - sparsity)·d·d_out - c·d_out) / (d + d_out)⌋, below the rank that the matrix can have.

    Args:
        d: Input channels.
        outputs: d_out, of this very linear: k and v are narrower than q where they are grouped.
        sparsity: 0 ≤ sparsity < 1; the budget is the other (1 - sparsity)·d·d_out weights.
        alpha: The share of it that is to be whole channels, 0 ≤ α ≤ 1.
    """
    left = (1 - sparsity) * d * outputs - kept(d, sparsity, alpha) * outputs
    return _whole(left / (d + outputs))


def _whole(number: float) -> int:
    # 0.29 * 100 is 28.999999999999996, and means 29.
    return math.floor(round(number, 6))
