"""What each look at a site's terms compares, counted, and the active sets that follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from countdown.calibration.sketch import MagnitudeSketch, PairSketch


class Looks:
    """Sketches of what each look at terms compares, weighted.

    Args:
        count: One or two.
        device: Where counting happens.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu") -> None:
        self.first = MagnitudeSketch(device)
        self.both = PairSketch(device) if count > 1 else None

    def add(self, first: Tensor, second: Tensor | None = None, losses: Tensor | None = None) -> None:
        """Count terms, see `MagnitudeSketch.add`.

        Args:
            first: What the first look compares.
            second: What the second does, of the same shape; not looked at without one.
            losses: What each term costs when it is dropped.
        """
        self.first.add(first, losses)
        if self.both is not None:
            assert second is not None
            self.both.add(first, second)

    def active(self, drops: Sequence[float], first: Tensor, second: Tensor | None = None) -> Tensor:
        """Return which terms are active, bool of the shape of `first`, by what was counted so far.

        Args:
            drops: The share of terms that is inactive after each look; see `Method.drops`.
            first, second: As for `add`.
        """
        if drops[-1] in (0, 1):
            return torch.full_like(first, drops[-1] == 0, dtype=torch.bool)
        threshold = self._first_threshold(drops[0])
        active = first > threshold.float()
        if self.both is None:
            return active
        assert second is not None
        left = torch.full_like(threshold, 1 - drops[-1])
        return active & (second > self.both.second_quantiles(threshold, left).float())

    def _first_threshold(self, share: float) -> Tensor:
        if share:
            return self.first.quantile(share)
        return torch.full((1,), -1.0, dtype=torch.float64, device=self.first.counts.device)

    def first_thresholds(self, drops: Tensor) -> Tensor:
        """Return τ of the first look for each share of inactive terms, float64, `[n]`."""
        found = self.first.quantiles(drops.clamp(min=1e-6))
        return torch.where(drops > 0, found, -1.0)

    def second_thresholds(self, drops: Tensor) -> Tensor:
        """Return τ of the second look for shares of inactive terms after each look, float64 `[n]` for `[n, 2]`."""
        assert self.both is not None
        return self.both.second_quantiles(self.first_thresholds(drops[:, 0]), 1 - drops[:, 1])
