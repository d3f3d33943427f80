"""A sketch of how large a non-negative quantity gets, from which any quantile follows."""

from __future__ import annotations

import torch
from torch import Tensor

# A bin is the numbers whose float32 patterns agree but for the last 17 bits: 64 bins for each power of two,
# over the whole range of float32, with zero in the first and the order of numbers that of bins.
_SHIFT = 17
_BINS = 1 << (31 - _SHIFT)


class MagnitudeSketch:
    """Counts of values by magnitude, in bins 1.6% wide or less, and what is lost when they are dropped.

    Counting is exact and independent of order. A quantile is interpolated inside its bin, so the share of the
    counted values at or below it differs from what was asked by less than the share of one bin.

    Args:
        device: Where counting happens.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self.losses: Tensor | None = None  # float64, once there are any

    def add(self, values: Tensor, losses: Tensor | None = None) -> None:
        """Count `values`, any shape, finite and non-negative (the sign of a zero does not matter).

        Args:
            values: What is counted.
            losses: What each costs when it is dropped, of the same shape.
        """
        patterns = values.float().abs().contiguous().view(torch.int32)
        bins = (patterns >> _SHIFT).flatten()
        self.counts += _sums(bins, None)
        if losses is not None:
            added = _sums(bins, losses.double().flatten())
            self.losses = added if self.losses is None else self.losses + added

    def quantiles(self, q: Tensor) -> Tensor:
        """Return, for each share in `q`, the value at or below which that share of the values lies.

        Args:
            q: Float `[n]`, each 0 < q < 1.

        Returns:
            Float64 `[n]`, on the device of `q`.

        Raises:
            ValueError: The sketch is empty, or a share is outside (0, 1).
        """
        self._check(q)
        return self._quantiles(q)

    def quantile(self, share: float) -> Tensor:
        """Return one quantile, float64 `[1]`, where the counts are, without reading them back.

        Args:
            share: 0 < share < 1. The sketch must not be empty.
        """
        return self._quantiles(torch.full((1,), share, dtype=torch.float32, device=self.counts.device))

    def _quantiles(self, q: Tensor) -> Tensor:
        index, inside = self._place(q)
        low, high = _edges(index), _edges(index + 1)
        return low + (high - low) * inside

    def lost(self, q: Tensor) -> Tensor:
        """Return, for each share in `q`, the sum of losses when that share of the values is dropped, smallest first.

        Arguments, shape, dtype and errors as for `quantiles`; ValueError also when no losses were added.
        """
        if self.losses is None:
            raise ValueError("the sketch has no losses")
        self._check(q)
        index, inside = self._place(q)
        losses = self.losses.to(q.device)
        return losses.cumsum(0)[index] - losses[index] * (1 - inside)

    def _check(self, q: Tensor) -> None:
        if not bool(((q > 0) & (q < 1)).all()):
            raise ValueError("a quantile is outside (0, 1)")
        if not bool(self.counts.any()):
            raise ValueError("the sketch is empty")

    def _place(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return in which bin each quantile lies and how far inside, 0 to 1."""
        counts = self.counts.to(q.device).double()
        cumulative = counts.cumsum(0)
        rank = q.double() * cumulative[-1]
        index = torch.searchsorted(cumulative, rank)
        return index, (rank - (cumulative[index] - counts[index])) / counts[index]


# Of pairs bins are an eighth of a power of two wide, so many powers of two, of which some are above the largest value
# that was seen at first. The first bin holds all that is smaller, the last all that is larger.
_PAIR_SHIFT = 20
_EACH = 1 << (23 - _PAIR_SHIFT)
_PAIR_BINS = 32 * _EACH
_ABOVE = 6 * _EACH


class PairSketch:
    """Counts of pairs by the magnitudes of both values, from which quantiles of one follow where the other is large.

    Quantiles are interpolated within bins, which are up to 9% wide.

    Args:
        device: Where counting happens.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(_PAIR_BINS, _PAIR_BINS, dtype=torch.int64, device=device)
        self._lowest: tuple[Tensor, Tensor] | None = None  # patterns of both first bins

    def add(self, first: Tensor, second: Tensor) -> None:
        """Count pairs, both of any one shape, finite and non-negative."""
        if self._lowest is None:
            self._lowest = _lowest_below(first), _lowest_below(second)
        bins = _pair_bins(first, self._lowest[0]) * _PAIR_BINS + _pair_bins(second, self._lowest[1])
        self.counts += _sums(bins.flatten(), None, self.counts.numel()).view_as(self.counts)

    def second_quantiles(self, above: Tensor, shares: Tensor) -> Tensor:
        """Return above which second value a share of all pairs lies whose first is larger than a number.

        Args:
            above: The numbers, `[n]`; below 0 of all pairs.
            shares: For each, of all pairs, `[n]`, 0 or more. Where fewer are that large it is 0.

        Returns:
            float64 `[n]`, on the device of `above`.

        Raises:
            ValueError: The sketch is empty.
        """
        if self._lowest is None:
            raise ValueError("the sketch is empty")
        lowest, lowest_second = (one.to(above.device) for one in self._lowest)
        counts = self.counts.to(above.device).double()
        wanted = shares.double() * counts.sum()
        larger = counts.flip(0).cumsum(0).flip(0)
        above = above.clamp(min=0)
        row = _pair_bins(above, lowest)
        low, high = _pair_edges(row, lowest), _pair_edges(row + 1, lowest)
        inside = ((above.double() - low) / (high - low)).clamp(0, 1)[:, None]
        # Of the bin that a number lies in, as much as lies above it.
        some = larger[row] - counts[row] * inside
        from_top = some.flip(1).cumsum(1)
        place = torch.searchsorted(from_top, wanted[:, None]).squeeze(1)
        column = (_PAIR_BINS - 1 - place).clamp(min=0)
        every = torch.arange(len(above), dtype=torch.int64, device=above.device)
        there = some[every, column]
        missing = wanted - (from_top[every, place.clamp(max=_PAIR_BINS - 1)] - there)
        low, high = _pair_edges(column, lowest_second), _pair_edges(column + 1, lowest_second)
        found = high - (high - low) * torch.where(there > 0, missing / there, 0.0).clamp(0, 1)
        return torch.where(place == _PAIR_BINS, 0.0, found)


def _lowest_below(values: Tensor) -> Tensor:
    """Return the pattern of the lowest bin, so that the largest of these values is in one of the uppermost."""
    largest = values.float().abs().amax()
    return _pattern(torch.where(largest > 0, largest, 1.0)) + _ABOVE - (_PAIR_BINS - 1)


def _pattern(values: Tensor) -> Tensor:
    return values.float().abs().contiguous().view(torch.int32) >> _PAIR_SHIFT


def _pair_bins(values: Tensor, lowest: Tensor) -> Tensor:
    return (_pattern(values) - lowest).clamp(0, _PAIR_BINS - 1)


def _pair_edges(index: Tensor, lowest: Tensor) -> Tensor:
    """Return the smallest value of each bin, float64, 0 of the first."""
    edges = ((index + lowest).clamp(min=0) << _PAIR_SHIFT).int().view(torch.float32).double()
    return torch.where(index == 0, 0.0, edges)


def _sums(bins: Tensor, weights: Tensor | None, count: int = _BINS) -> Tensor:
    """Return how many values are in each bin, int64, or the sum of their weights, float64."""
    if bins.is_cpu:
        return torch.bincount(bins, weights, minlength=count)
    # Not by adding each to its bin: most are in few bins, where they wait for each other, six times as long as this.
    dtype = torch.int16 if count <= 1 << 15 else torch.int32
    ordered, order = bins.to(dtype).sort()
    every = torch.arange(count, dtype=dtype, device=bins.device)
    ends = torch.searchsorted(ordered, every, right=True)
    if weights is None:
        return ends.diff(prepend=ends.new_zeros(1))
    running = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])[ends]
    return running.diff(prepend=running.new_zeros(1))


def _edges(index: Tensor) -> Tensor:
    """Return the smallest value of each bin, float64."""
    return (index << _SHIFT).int().view(torch.float32).double()
