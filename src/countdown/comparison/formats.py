"""Numbers as people read them. What was not measured is a dash, what is not finite is named.

A minus is the one that terminals, CSV and what the report quotes have, so that a search finds all of them.
"""

from __future__ import annotations

import math

NOT_MEASURED = "–"
MICROSECONDS = 1e6
# Further digits tell nobody anything.
MOST_DIGITS = 8


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits after the point, thousands apart."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    rounded = round(value, digits) + 0.0  # of a negative zero it makes a zero
    return f"{rounded:,.{digits}f}"


def digits_apart(value: float | None, landmark: float, digits: int) -> int:
    """Return how many digits, `digits` at least, tell a value from one that it is not: 0.996 is not 1.00."""
    if value is None or not math.isfinite(value):
        return digits
    while value != landmark and round(value, digits) == landmark and digits < MOST_DIGITS:
        digits += 1
    return digits


def share(value: float | None, digits: int = 0) -> str:
    """Return a share as a percentage: 0.5 is 50%."""
    text = number(None if value is None else 100 * value, digits)
    return text if text == NOT_MEASURED else f"{text}%"


def change(value: float | None, digits: int = 1) -> str:
    """Return a share with its sign, 0.016 is +1.6%, also where it rounds to 0: an interval says on which side it is."""
    if value is None or not math.isfinite(value):
        text = share(value, digits)
        return text if text.startswith((NOT_MEASURED, "-")) else f"+{text}"
    return f"{100 * value + 0.0:+,.{digits}f}%"  # of a negative zero 0.0 makes a zero


def interval(ends: tuple[float, float] | None, digits: int = 1) -> str:
    """Return an interval of changes: +1.1% to +2.2%; empty where there is none."""
    if ends is None or any(math.isnan(end) for end in ends):
        return ""
    return " to ".join(change(end, digits) for end in ends)


def times(value: float | None, digits: int = 2) -> str:
    """Return a factor: 1.31×."""
    text = number(value, digits)
    return text if text == NOT_MEASURED else f"{text}×"


def factors(ends: tuple[float, float] | None) -> str:
    """Return an interval of factors: 1.28 to 1.33; empty where there is none."""
    return "" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def count(amount: int, noun: str) -> str:
    """Return an amount with its noun: 1 window, 2 windows."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def listed(names: list[str]) -> str:
    """Return names as a sentence has them: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def described(value: object) -> str:
    """Return what a results file says about itself, nested as it may be, as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')}: {described(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(described(inner) for inner in value)
    return str(value)
