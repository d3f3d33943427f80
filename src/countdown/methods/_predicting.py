"""Methods that can predict what they drop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from countdown.artifacts import Artifact, Artifacts
from countdown.compensation import Compensation
from countdown.config import check_choice
from countdown.errors import ConfigError
from countdown.methods._base import Method

if TYPE_CHECKING:
    from typing import Self

LEAST_RIDGE, MOST_RIDGE = 1e-4, 1e3


@dataclass(frozen=True, kw_only=True)
class Predicting(Method):
    """A method of FFNs that may add what its dropped neurons would, predicted linearly from the FFN's input; ours.

    Args:
        compensate: `none`, as published, or `affine`: L x + b, see `compensation.affine`. It reads a matrix as large as
            one from d to d, in 4 bits, for each token.
        ridge: λ of its least squares, relative to each input's mean square: larger ones hold on more kinds of text.

    Raises:
        ConfigError: See `Method`; λ is out of range.
    """

    calibrated: ClassVar[tuple[str, ...]] = ("weighting", "compensate", "ridge")

    compensate: str = "none"
    ridge: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_choice(f"compensate of {self.name}", self.compensate, ("none", "affine"))
        number = isinstance(self.ridge, int | float) and not isinstance(self.ridge, bool)
        if not number or not LEAST_RIDGE <= self.ridge <= MOST_RIDGE:
            raise ConfigError(
                f"ridge of {self.name} is {str(self.ridge)[:20]}, expected {LEAST_RIDGE:g} to {MOST_RIDGE:g}."
            )

    @property
    def compensation(self) -> Compensation | None:
        """See `Method.compensation`."""
        if self.compensate == "none":
            return None
        from countdown.compensation.affine import Affine  # loads torch

        return Affine(self.sparsity)

    @property
    def fitted(self) -> tuple[str, ...]:
        """See `Method.fitted`: other ones drop others than those that are predicted."""
        return () if self.compensate == "none" else ("decision", "allocation")

    def disagreement(self, artifacts: Artifacts) -> str | None:
        """See `Method.disagreement`."""
        from countdown.compensation.affine import disagreement

        return disagreement(artifacts) if self.fitted else None

    def with_artifacts(self, artifacts: Artifacts) -> Self:
        """See `Method.with_artifacts`: below the lowest sparsity that was fitted, a fit would add too much."""
        from countdown.compensation.affine import AT, Affine

        compensation = self.compensation
        if (
            not isinstance(compensation, Affine)
            or AT.name not in artifacts
            or compensation.taken(artifacts) is not None
        ):
            return self
        return replace(self, compensate="none")

    def artifacts(self) -> tuple[Artifact, ...]:
        """See `Method.artifacts`."""
        return (*super().artifacts(), *(self.compensation.artifacts if self.compensation else ()))

    def passes(self) -> tuple[str, ...]:
        """See `Method.passes`."""
        return (*super().passes(), *(("affine",) if self.compensate != "none" else ()))

    @property
    def label(self) -> str:
        return super().label if self.compensate == "none" else f"{super().label} + {self.compensate}"
