"""How much is measured where nothing else is asked for: usually, and in a hurry."""

from __future__ import annotations

from dataclasses import dataclass

from countdown.benchmark import arm
from countdown.benchmark.timing import Rounds


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        windows: To evaluate on.
        tokens: To calibrate on.
        sparsities: Of each method.
        published: Compare methods as published, too, not as most do best alone.
        rounds: Of timing; see `arm.measure`.
    """

    windows: int
    tokens: int
    sparsities: tuple[float, ...]
    published: bool
    rounds: Rounds


USUAL = Effort(12, 16384, (0.3, 0.5, 0.7, 0.8), published=True, rounds=arm.USUAL)
QUICK = Effort(4, 2048, (0.5, 0.7), published=False, rounds=Rounds(arm.ROUNDS, 2 * arm.ROUNDS, most_s=15.0))
