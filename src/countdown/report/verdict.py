"""The recommendation, in words and in a few numbers beside its rivals."""

from __future__ import annotations

from dataclasses import dataclass

from countdown.comparison.comparison import Cell, Comparison, Recommendation, Speed
from countdown.comparison.formats import change, factors, interval, number, share, times

NOTHING_FITS = "Nothing measured fits what was asked for"
NO_WISH = "Nothing was asked for, so nothing is recommended"


@dataclass(frozen=True)
class Verdict:
    """What to do.

    Args:
        headline: In a few words.
        reason: The numbers that decided.
        confirmation: What text said that no decision saw.
        confirmed: Whether it agreed; None where there was none.
        figures: (number, what it is) of the recommended configuration.
        rivals: Dense, recommended and quantised configurations.
    """

    headline: str
    reason: str
    confirmation: str
    confirmed: bool | None
    figures: list[tuple[str, str]]
    rivals: list[Cell]


def verdict(comparison: Comparison) -> Verdict:
    """Return the recommendation of a comparison."""
    found = comparison.recommendation
    label = found.label if found else None
    rivals = [cell for cell in comparison.cells if cell.kind != "sparse" or cell.label == label]
    if found is None:
        return Verdict(NOTHING_FITS if comparison.meta.get("wish") else NO_WISH, "", "", None, [], rivals)
    chosen = next((cell for cell in comparison.cells if cell.label == label), None)
    headline = "Stay dense" if chosen and chosen.kind == "dense" else f"Take {label}"
    headline += ", roughly" if comparison.rough else ""
    figures = _figures(found, chosen)
    return Verdict(headline, found.reason, _confirmation(found), found.confirmed, figures, rivals)


def _figures(found: Recommendation, chosen: Cell | None) -> list[tuple[str, str]]:
    ends = interval(found.interval)
    figures = [(change(found.expected_loss), f"perplexity; on other windows {ends} (95%)" if ends else "perplexity")]
    if chosen and chosen.speed:
        figures.append((times(chosen.speed.speedup), _speed_words(chosen.speed)))
    if chosen and chosen.weights_read is not None:
        figures.append((share(chosen.weights_read), "of dense weight bytes read for a token"))
    return figures


def _speed_words(speed: Speed) -> str:
    interval = f" (95%: {factors(speed.interval)})" if speed.interval and speed.speedup != 1 else ""
    return (
        f"dense speed{interval}, {number(speed.tokens_per_s, 1)} tokens/s; dense beside {number(speed.dense_beside, 1)}"
    )


def _confirmation(found: Recommendation) -> str:
    if found.confirmed_loss is None:
        return "No text was left to confirm the loss on: expect it to be somewhat larger than measured."
    where = "inside" if found.confirmed else "outside"
    return f"On text that no decision saw, perplexity changes by {change(found.confirmed_loss)}: {where} that range."
