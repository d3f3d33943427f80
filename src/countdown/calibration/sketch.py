"""A mergeable sketch of how large a non-negative quantity gets, from which any quantile follows."""

from __future__ import annotations

import torch
from torch import Tensor

# A bin is the numbers whose float32 patterns agree but for the last 17 bits: 64 bins for each power of two,
# over the whole range of float32, with zero in the first and the order of numbers that of bins.
_SHIFT = 17
_BINS = 1 << (31 - _SHIFT)


class MagnitudeSketch:
    """Counts of values by magnitude, in bins 1.6% wide or less.

    Adding is exact and independent of order. A quantile is interpolated inside its bin, so the share of the
    counted values at or below `quantile(q)` differs from q by less than the share of one bin.

    Args:
        counts: int64 `[16384]`; zero when omitted.
        device: Where counting happens, if `counts` is omitted.
    """

    def __init__(self, counts: Tensor | None = None, *, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64, device=device) if counts is None else counts

    @property
    def total(self) -> int:
        """How many values were added."""
        return int(self.counts.sum())

    def add(self, values: Tensor) -> None:
        """Count `values`, any shape, finite and non-negative (the sign of a zero does not matter)."""
        patterns = values.float().abs().contiguous().view(torch.int32)
        self.counts += torch.bincount((patterns >> _SHIFT).flatten(), minlength=_BINS)

    def quantile(self, q: float) -> float:
        """Return the value at or below which a share `q` of the values lies; -1 for q = 0.

        Raises:
            ValueError: The sketch is empty, or q is outside [0, 1).
        """
        if not 0 <= q < 1:
            raise ValueError(f"q is {q}, expected 0 ≤ q < 1")
        if q == 0:
            return -1.0
        cumulative = self.counts.cumsum(0)
        total = int(cumulative[-1])
        if total == 0:
            raise ValueError("the sketch is empty")
        rank = q * total
        index = int(torch.searchsorted(cumulative.double(), rank))
        below = int(cumulative[index - 1]) if index else 0
        low, high = _edge(index), _edge(index + 1)
        return low + (high - low) * (rank - below) / int(self.counts[index])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the counted bins: `bins` int32 `[n]`, `counts` int64 `[n]`."""
        bins = self.counts.nonzero().flatten()
        return {"bins": bins.int().cpu(), "counts": self.counts[bins].cpu()}

    @classmethod
    def from_tensors(cls, bins: Tensor, counts: Tensor) -> MagnitudeSketch:
        """Return the sketch that `to_tensors` described.

        Raises:
            ValueError: The tensors do not describe one.
        """
        if bins.shape != counts.shape or bins.dim() != 1 or not bool(((bins >= 0) & (bins < _BINS)).all()):
            raise ValueError("a sketch needs bins and counts of the same length, bins within range")
        sketch = cls()
        sketch.counts[bins.long()] = counts.long()
        return sketch


def _edge(index: int) -> float:
    """Return the smallest value of bin `index`."""
    return float(torch.tensor(index << _SHIFT, dtype=torch.int32).view(torch.float32))
