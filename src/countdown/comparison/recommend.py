"""Which configuration to take.

Of those that keep what was wished for:
- with a largest loss, the one that gains most; the upper end of its interval of the loss must keep to it;
- with a least speed-up alone, the one that loses least;
- with no wish, the best trade: the largest gain / (1 + loss), so that a percent of perplexity weighs as a percent of
  speed.

The gain is the measured speed-up; the lower end of its interval must keep to the wish, and show that it is faster than
dense at all. A speed-up that is not to be relied on (`Cell.doubt`) takes no part. Where no speed was measured the gain
is 1 / weights read of a whole token, what decoding bound by memory bandwidth could gain. The dense model takes part,
with gain 1 and loss 0, so nothing slower than it is ever recommended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from countdown.comparison.bootstrap import prediction_intervals
from countdown.comparison.comparison import Cell, Quality, Recommendation
from countdown.comparison.grid import Wish


@dataclass(frozen=True)
class Candidate:
    """A cell that could be recommended.

    Args:
        cell: The cell.
        quality: What it costs.
        gain: How many times as fast as dense, measured or by bytes.
        least: The lower end of its interval.
    """

    cell: Cell
    quality: Quality
    gain: float
    least: float

    def keeps(self, wish: Wish) -> bool:
        """Return whether it fulfils a wish."""
        quick = self.cell.kind == "dense" or self.least > 1
        quick = quick and (wish.min_speedup is None or self.least >= wish.min_speedup)
        return quick and (wish.max_loss is None or self.quality.loss_interval[1] <= wish.max_loss)

    def merit(self, wish: Wish) -> float:
        """Return what is to be largest of those that keep a wish."""
        if wish.max_loss is not None:
            return self.gain
        return -self.quality.loss if wish.min_speedup is not None else self.gain / (1 + self.quality.loss)


def recommend(cells: Sequence[Cell], wish: Wish, others: int, *, seed: int = 0) -> Recommendation | None:
    """Return which cell to take, None if none keeps the wish.

    Args:
        cells: Dense first.
        wish: What was asked for.
        others: How many windows there are to confirm it on; the interval is for so many, or for as many as were
            evaluated if there are none.
        seed: Of resampling.
    """
    candidates = _candidates(cells)
    kept = [one for one in candidates if one.keeps(wish)]
    if not kept:
        return None
    best = max(kept, key=lambda one: (one.merit(wish), -one.quality.loss))
    expected, interval = best.quality.loss, (0.0, 0.0)
    if best.cell.kind != "dense":
        interval = _interval(candidates, best, others, seed)
    reason = _reason(best, kept, candidates, wish) + _left_out(cells)
    return Recommendation(best.cell.label, reason, expected, interval)


def nearest(cells: Sequence[Cell], wish: Wish) -> str:
    """Return a sentence for when no cell keeps the wish."""
    fast = max(_candidates(cells), key=lambda one: one.gain)
    return (
        f"Nothing that was measured fulfils the wish ({wish}); the largest gain is that of {_words(fast)}. "
        f"Allow more loss or ask for less speed.{_left_out(cells)}"
    )


def _candidates(cells: Sequence[Cell]) -> list[Candidate]:
    """Return the cells that have what it takes to judge them."""
    timed = cells[0].speed is not None
    found = []
    for cell in cells:
        gain = (cell.speed and cell.speed.speedup) if timed else (cell.weights_read and 1 / cell.weights_read)
        if cell.quality is not None and gain and cell.doubt is None:
            found.append(Candidate(cell, cell.quality, gain, cell.speed.gain.low if timed and cell.speed else gain))
    return found


def _left_out(cells: Sequence[Cell]) -> str:
    """Return a sentence on what takes no part because its speed-up is not to be relied on."""
    left = [cell.label for cell in cells if cell.doubt is not None]
    return f" Left out, as their speed-ups are unreliable: {', '.join(left)}." if left else ""


def _interval(candidates: Sequence[Candidate], best: Candidate, others: int, seed: int) -> tuple[float, float]:
    dense = candidates[0].quality.window_nll
    judged = [one for one in candidates if one.cell.kind != "dense"]
    differences = [[nll - d for nll, d in zip(one.quality.window_nll, dense, strict=True)] for one in judged]
    return prediction_intervals(differences, others or len(dense), seed=seed)[judged.index(best)]


def _reason(best: Candidate, kept: Sequence[Candidate], candidates: Sequence[Candidate], wish: Wish) -> str:
    if best.cell.kind == "dense":
        first = f"Stay dense: of {len(candidates) - 1} configurations, none is surely better ({wish})."
    else:
        first = f"{_words(best)}: the best of {len(candidates) - 1} configurations ({wish})."
    rest = [one for one in kept if one.cell.kind not in (best.cell.kind, "dense")]
    near = rest or [one for one in candidates if one.cell.kind not in (best.cell.kind, "dense")]
    if not near:
        return first
    if rest:
        second = max(rest, key=lambda one: one.merit(wish))
        return f"{first} Best of the {second.cell.kind} ones: {_words(second)}."
    second = max(near, key=lambda one: _nearness(one, wish))
    return f"{first} No {second.cell.kind} one {_missed(wish)}: {_words(second)}."


def _nearness(one: Candidate, wish: Wish) -> float:
    """Return what is largest of the one that comes nearest to a wish, of those that miss it."""
    if wish.max_loss is not None:
        return -one.quality.loss
    return one.gain if wish.min_speedup is not None else one.merit(wish)


def _missed(wish: Wish) -> str:
    if wish.max_loss is not None:
        return "fulfils it; nearest in loss"
    if wish.min_speedup is not None:
        return "fulfils it; nearest in speed"
    return "is surely faster than dense, as far as measured; the best"


def _words(one: Candidate) -> str:
    how = "times as fast as dense" if one.cell.speed else "times fewer weight bytes than dense"
    if one.cell.speed and one.cell.speed.interval and one.cell.kind != "dense":
        how += " (95%: {:.2f} to {:.2f})".format(*one.cell.speed.interval)
    low, high = one.quality.loss_interval
    return (
        f"{one.cell.label}, {one.gain:.2f} {how}, perplexity {one.quality.loss:+.1%} (95%: {low:+.1%} to {high:+.1%})"
    )
