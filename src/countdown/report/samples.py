"""What configurations wrote beside what the dense model wrote, with the tokens that differ marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from countdown.comparison.comparison import Sample
from countdown.comparison.formats import count


@dataclass(frozen=True)
class Piece:
    """A run of tokens as text, and whether the dense model wrote others there."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Marked:
    """An answer.

    Args:
        label: Of the configuration.
        pieces: The answer, in runs.
        note: How it compares with the dense model's.
    """

    label: str
    pieces: list[Piece]
    note: str


def mark(label: str, sample: Sample, dense: Sample | None) -> Marked:
    """Return an answer with the tokens marked that the dense one does not have at that place of the alignment."""
    if dense is None:
        return Marked(label, [Piece("".join(sample.pieces), False)], "The dense model's answer is missing.")
    steps = SequenceMatcher(None, dense.tokens, sample.tokens, autojunk=False).get_opcodes()
    pieces = [
        Piece("".join(sample.pieces[start:stop]), kind != "equal") for kind, _, _, start, stop in steps if start < stop
    ]
    return Marked(label, pieces, _note(sample.tokens, dense.tokens, steps))


def _note(tokens: Sequence[int], dense: Sequence[int], steps: Sequence[tuple[str, int, int, int, int]]) -> str:
    if list(tokens) == list(dense):
        return f"The same {count(len(dense), 'token')} as dense."
    first = next(start for kind, _, _, start, _ in steps if kind != "equal")
    kept = sum(stop - start for kind, _, _, start, stop in steps if kind == "equal")
    start = f"As dense up to token {first}" if first else "Other than dense from the first token on"
    return f"{start}; {len(tokens) - kept} of {count(len(tokens), 'token')} differ."
