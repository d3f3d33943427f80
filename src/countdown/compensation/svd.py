"""R-Sparse's low-rank term: the truncated SVD of a linear's weight, applied to the inputs that it drops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from countdown.artifacts import Artifacts
from countdown.compensation._base import Compensation, register
from countdown.compensation._budget import rank
from countdown.sums import Sum
from countdown.weights import Plain, Weight

# Entries.
ALIGNED = 16


@register
@dataclass(frozen=True)
class DroppedSvd(Compensation):
    """A (B (x ⊙ ¬m)) with A B the truncated SVD of W: R-Sparse (arXiv 2504.19449, section 3).

    Of a budget of (1 - sparsity)·d·d_out weights the share α pays for whole input channels; the rest for the rank, of
    which one costs d + d_out.

    Args:
        sparsity: Of the budget, 0 ≤ sparsity < 1.
        alpha: The share of whole channels, 0 ≤ α < 1.
    """

    name = "svd"

    sparsity: float
    alpha: float

    @staticmethod
    def shapes(d: int, terms: int) -> tuple[tuple[int | None, int | None], ...]:
        return (None, d), (None, None)

    @staticmethod
    def problem(sum_: Sum, parts: Sequence[Weight]) -> str | None:
        inner, outer = parts
        expected = (inner.shape[0], sum_.terms), (sum_.outputs, inner.shape[0])
        found = inner.shape, outer.shape
        return None if found == expected else f"B and A are {found}, expected {expected}"

    @staticmethod
    def added(x: Tensor, dropped: Tensor, sparse: Tensor, parts: Sequence[Weight]) -> Tensor:
        inner, outer = (part.values().float() for part in parts)
        # Rounded once, as kernels do.
        return (torch.where(dropped, x.float(), 0) @ inner.t() @ outer.t()).to(x.dtype)

    def make(self, sum_: Sum, artifacts: Artifacts) -> tuple[Weight, ...]:
        """Return B `[rank, d]`, laid out by input channel, and A `[d_out, rank]`, in the dtype of the weight; so that
        what belongs to a channel, or to an output, begins at a multiple of 16 entries.
        """
        return self.fitted(sum_, [Plain([factor]) for factor in truncated(_weight(sum_), self._rank(sum_))])

    def fitted(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Weight, ...]:
        inner, outer = (part.values().to(_weight(sum_)) for part in parts)
        return Plain([_apart(inner.t()).t()]), Plain([_apart(outer)])

    def cut(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Weight, ...]:
        """See `Compensation.cut`: singular values come in order."""
        inner, outer = parts
        first = slice(self._rank(sum_))
        return inner.sliced(0, first), outer.sliced(1, first)

    def made_from(self, sum_: Sum) -> Sequence[Weight]:
        return sum_.weights[-1:]

    def made_as(self, sum_: Sum) -> str:
        """See `Keeper.made_as`: factors are rounded to the dtype of the weight; what their rank is, `out_of` sees."""
        return f"{self.name} {_weight(sum_).dtype}"

    def out_of(self, sum_: Sum, stored: Sequence[Weight]) -> Sequence[Weight] | None:
        """See `Keeper.out_of`: those of a higher rank hold those of a lower."""
        rank = self._rank(sum_)
        inner, outer = parts = self.cut(sum_, stored)
        return parts if (inner.shape, outer.shape) == ((rank, sum_.terms), (sum_.outputs, rank)) else None

    def part_bytes(self, sum_: Sum) -> int:
        """See `Keeper.part_bytes`; with what rows are apart for."""
        held = _aligned(self._rank(sum_)) * (sum_.terms + sum_.outputs)
        return round(held * _bytes_each(sum_))

    def bytes_read(self, sum_: Sum, active: float) -> float:
        """See `Compensation.bytes_read`; columns of B at kept channels are not read."""
        return self._weights(sum_, 1 - active) * _bytes_each(sum_)

    def _rank(self, sum_: Sum) -> int:
        return rank(sum_.terms, sum_.outputs, self.sparsity, self.alpha)

    def _weights(self, sum_: Sum, dropped: float) -> float:
        return self._rank(sum_) * (sum_.terms * dropped + sum_.outputs)


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B, float64 `[rank, d]`, and A, float64 `[d_out, rank]`, with A B the best matrix of this rank.

    The leading singular vectors of the smaller side, largest first, and W projected on them. So a smaller rank is the
    first rows of B and columns of A.

    Args:
        weight: W, any float dtype, `[d_out, d]`.
        rank: 0 ≤ rank ≤ min(d, d_out).
    """
    w = weight.double()
    outputs, d = w.shape
    smaller = w @ w.t() if outputs <= d else w.t() @ w
    vectors = torch.linalg.eigh(smaller).eigenvectors.flip(1)[:, :rank]
    return (vectors.t() @ w, vectors) if outputs <= d else (vectors.t(), w @ vectors)


def _apart(matrix: Tensor) -> Tensor:
    """Return a matrix with rows that begin at multiples of `ALIGNED`, so that kernels read them in whole words."""
    rows, columns = matrix.shape
    room = matrix.new_zeros((rows, _aligned(columns)))
    room[:, :columns] = matrix
    return room[:, :columns]


def _aligned(columns: int) -> int:
    return math.ceil(columns / ALIGNED) * ALIGNED


def _weight(sum_: Sum) -> Tensor:
    return sum_.weights[-1].values().detach()


def _bytes_each(sum_: Sum) -> float:
    rows, columns = sum_.weights[-1].shape
    return sum_.weights[-1].nbytes / (rows * columns)
