"""What came of measuring a part of a cell: numbers, a refusal, or an accident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from countdown.comparison import tasks
from countdown.comparison.comparison import Quality, Sample, Speed
from countdown.errors import AccidentError, CountdownError


@dataclass(frozen=True)
class Outcome:
    """What came of measuring a part of a cell.

    Args:
        value: As JSON can hold it; None if it failed.
        problem: One line that says why it failed.
        refused: Whether it was refused on purpose, as it would be again.
    """

    value: dict[str, Any] | None = None
    problem: str | None = None
    refused: bool = False

    @property
    def final(self) -> bool:
        """Whether measuring again would come to the same."""
        return self.problem is None or self.refused


def attempt(measure: Callable[[], dict[str, Any]]) -> Outcome:
    """Return what comes of measuring: one configuration that fails, however it does, must not stop the others."""
    try:
        return Outcome(measure())
    except CountdownError as error:
        return Outcome(problem=_line(str(error)), refused=not isinstance(error, AccidentError))
    except Exception as error:
        return Outcome(problem=_line(f"{type(error).__name__}: {error}"))


def checked(part: str, outcome: Outcome) -> Outcome:
    """Return an outcome from the cache, or raise where its value is not what belongs there."""
    if outcome.value is not None:
        _PARSERS.get(part, tasks.parse)(outcome.value[part])
    elif outcome.problem is None:
        raise ValueError("neither a value nor a problem")
    return outcome


# Any other part is a task.
_PARSERS: dict[str, Callable[[Any], object]] = {
    "quality": Quality.parse,
    "speed": Speed.parse,
    "sample": lambda value: Sample(**value),
}


def _line(message: str) -> str:
    return " ".join(message.split())[:500]
