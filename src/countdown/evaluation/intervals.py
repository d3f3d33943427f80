"""Confidence intervals of means, for differences that come in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval at 95%.

    Args:
        mean: Of the sample.
        low, high: Student's t interval; None for fewer than three values, which say nothing about their spread.
    """

    mean: float
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and Student's t interval around it: mean ± t·s/√n.

    For a comparison of two runs on the same documents, the values are the differences by document.
    """
    mean, error = fmean(values), standard_error(values)
    if error is None or len(values) < 3:
        return Interval(mean, None, None)
    half = t_quantile(0.5 + CONFIDENCE / 2, len(values) - 1) * error
    return Interval(mean, mean - half, mean + half)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent values, s/√n; None for fewer than two of them."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution with `freedom` ≥ 2 degrees, within 1%.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
