"""How sure a loss of perplexity is, from the windows it was measured on.

What varies is a window's difference d of mean negative log-likelihood, this configuration's less the dense model's on
the same window: pairing them takes out what makes one window harder than another. The loss is exp(mean d) - 1.

`loss_interval` is about the mean over such windows: a percentile bootstrap over windows.

`prediction_intervals` are about what is promised for a recommendation: the loss that other windows of the same text
will show. Two things make them wider. The other windows are a sample as well, so the variance is that of a difference
of two means, s²(1/n + 1/m). And the recommended cell was picked because its numbers looked good, among many. So the
interval is simultaneous: each resample of windows gives every cell a difference, mean of m others less mean of n, the
same windows for all cells, in units of its own standard error; the factor is the 95th percentile of the largest of them
(Westfall and Young's max-t). An interval that holds for all cells at once holds for the one that was picked, by
whatever rule; where many cells differ alike it costs little, else it is wider than the picked one alone would need.
That s is itself estimated from n windows is made up for as in Student's t, by a χ² of n - 1 degrees drawn for each
resample. It takes windows that are dealt at random into those evaluated and the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 4000
# Resamples at a time, so that memory stays small.
AT_ONCE = 500
# Below, a spread of windows is not to be estimated.
FEWEST_WINDOWS = 4


def loss_interval(differences: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of the loss, by resampling windows.

    Args:
        differences: By window, mean negative log-likelihood less that of the dense model.
        seed: Of the resampling.
    """
    d = torch.tensor(differences, dtype=torch.float64, device="cpu")
    picks = torch.randint(
        len(d), (RESAMPLES, len(d)), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
    )
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64, device="cpu")
    low, high = d[picks].mean(dim=1).quantile(tails).tolist()
    return math.expm1(low), math.expm1(high)


def prediction_intervals(
    differences: Sequence[Sequence[float]], others: int, *, seed: int = 0
) -> list[tuple[float, float]]:
    """Return, for each cell, where the loss on so many other windows lies, for all cells at once with 95%.

    Args:
        differences: By cell and window, mean negative log-likelihood less that of the dense model; all cells on the
            same windows.
        others: How many windows that no decision saw.
        seed: Of the resampling.
    """
    d = torch.tensor(differences, dtype=torch.float64, device="cpu")
    reach = _factor(d, others, seed) * _standard_error(d, others)
    pairs = zip((d.mean(dim=1) - reach).tolist(), (d.mean(dim=1) + reach).tolist(), strict=True)
    return [(_rise(low), _rise(high)) for low, high in pairs]


def _rise(nats: float) -> float:
    """Return the rise of perplexity, as a share; infinite where the spread of a useless cell is that wide."""
    try:
        return math.expm1(nats)
    except OverflowError:
        return math.inf


def _standard_error(d: Tensor, others: int) -> Tensor:
    """Return that of the difference between the means of other windows and of these, of d `[cells, windows]`."""
    return d.std(dim=1) * math.sqrt(1 / d.shape[1] + 1 / others)


def _factor(d: Tensor, others: int, seed: int) -> float:
    """Return how many standard errors the largest difference over cells keeps within, with 95%."""
    generator = torch.Generator().manual_seed(seed)
    windows = d.shape[1]
    # Resampled windows spread less than those they are drawn from, by (n - 1) / n.
    error = (_standard_error(d, others) * math.sqrt((windows - 1) / windows))[:, None]
    found = []
    for _ in range(RESAMPLES // AT_ONCE):
        picks = [
            torch.randint(windows, (AT_ONCE, size), generator=generator, dtype=torch.int64, device="cpu")
            for size in (windows, others)
        ]
        means = [d[:, picked].mean(dim=2) for picked in picks]
        # A cell that does not differ from dense has neither difference nor error.
        t = ((means[1] - means[0]) / error).nan_to_num(nan=0.0)
        normal = torch.randn(AT_ONCE, windows - 1, generator=generator, dtype=torch.float32, device="cpu")
        found.append(t.abs().amax(dim=0) / normal.square().mean(dim=1).sqrt())
    return float(torch.cat(found).quantile(LEVEL))
