"""How many times as fast one run is as another, from rounds in which they took turns, and how sure that is.

What slows the machine for a while slows both runs of a round, and cancels in their ratio. The speed-up is the median of
the rounds' ratios, on logarithms: the other way round it is the inverse. Its interval is that of order statistics, the
sign test turned about: the k-th smallest and the k-th largest ratio, for the largest k with P(Binomial(n, ½) < k) at
most 2.5%. It holds for the median of any distribution, stalls and all, with 95% or more. What it asks is that rounds be
independent: where load comes and goes over many of them it is somewhat too narrow.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
# Ends of an interval that are no further apart, as a ratio, are narrow enough to stop measuring.
NARROW = 1.04
# Ends that are further apart say that the machine, not the model, was measured.
WILD = 1.5
# The ceiling counts bytes of weights, and a token reads a little besides.
ABOVE_CEILING = 1.05


@dataclass(frozen=True)
class Speedup:
    """How many times as fast.

    Args:
        value: The median over rounds.
        low, high: Its 95% interval; 0 and infinity where there are too few rounds for one.
    """

    value: float
    low: float
    high: float

    @property
    def narrow(self) -> bool:
        """Whether more rounds would say little more."""
        return self.high <= NARROW * self.low

    def doubt(self, ceiling: float | None = None) -> str | None:
        """Return why this is no speed-up to rely on, None where it is one.

        Args:
            ceiling: What the bytes that are read allow: those of the dense model over its own.
        """
        interval = f"95%: {self.low:.2f} to {self.high:.2f}"
        if not self.high <= WILD * self.low:
            return f"it swings too much to be told ({interval})"
        if ceiling is not None and self.value > ABOVE_CEILING * ceiling:
            return f"{self.value:.2f} times dense was measured ({interval}), and its bytes allow {ceiling:.2f}"
        return None


def paired(over: Sequence[float], under: Sequence[float]) -> Speedup:
    """Return how many times as long `over` took as `under`, in the same rounds."""
    ratios = sorted(one / other for one, other in zip(over, under, strict=True))
    value = math.exp(statistics.median(map(math.log, ratios)))
    place = _place(len(ratios))
    return Speedup(value, ratios[place - 1], ratios[-place]) if place else Speedup(value, 0.0, math.inf)


def _place(rounds: int) -> int:
    """Return k: the interval's ends are the k-th smallest and the k-th largest of so many; 0 where there is none."""
    below, place = 0, 0
    while (below := below + math.comb(rounds, place)) <= (1 - LEVEL) / 2 * 2**rounds:
        place += 1
    return place
