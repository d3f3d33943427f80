"""Methods that may look at a coefficient a second time, when all of it is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from countdown.artifacts import NORMS, SECOND_THRESHOLDS, Artifact
from countdown.errors import ConfigError
from countdown.methods._predicting import Predicting

if TYPE_CHECKING:
    from typing import Self

MOST = 0.5
# The middle of the shares with which it was first tried.
USUAL = 0.15


@dataclass(frozen=True, kw_only=True)
class Looking(Predicting):
    """A method of FFNs that decides by one of the two factors of a coefficient, and may decide again by both; ours.

    The other factor is computed for the neurons that the first look leaves. Then their whole coefficient is known
    before W_down is read, so that some of its rows need not be. What both looks read together is what one would.

    Args:
        second_look: By what share of the active neurons the first look keeps more, and the second less: with
            0.15, 1.15 and 0.85 times as many. 0 for one look, as published.

    Raises:
        ConfigError: See `Predicting`; a second look that is out of range, or at another decision than `threshold`.
    """

    calibrated: ClassVar[tuple[str, ...]] = (*Predicting.calibrated, "second_look")

    second_look: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        number = isinstance(self.second_look, int | float) and not isinstance(self.second_look, bool)
        if not number or not 0 <= self.second_look <= MOST:
            raise ConfigError(
                f"second_look of {self.name} is {repr(self.second_look)[:20]}, expected 0 to {MOST:g} ({USUAL:g} is "
                "usual, 0 for none)."
            )
        if self.second_look and self.decision != "threshold":
            raise ConfigError(
                f"decision '{self.decision}' of {self.name} does not go with a second look, which compares with a "
                "threshold: take second_look 0."
            )

    @property
    def drops(self) -> tuple[float, ...]:
        """See `Method.drops`."""
        if not self.second_look:
            return super().drops
        first = max(0.0, 1 - (1 + self.second_look) * (1 - self.sparsity))
        return first, 2 * self.sparsity - first

    @property
    def one_look(self) -> Self:
        """See `Method.one_look`."""
        return replace(self, second_look=0.0)

    def artifacts(self) -> tuple[Artifact, ...]:
        """See `Method.artifacts`."""
        norms = (NORMS,) if self.weighting == "column-norm" else ()
        return (*super().artifacts(), *((SECOND_THRESHOLDS, *norms) if self.second_look else ()))

    @property
    def label(self) -> str:
        if not self.second_look:
            return super().label
        return f"{super().label}, second look" + ("" if self.second_look == USUAL else f" {self.second_look:g}")
