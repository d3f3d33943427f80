"""The base of every method: its settings, its selector, and what it needs from calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from countdown.allocation import ALLOCATIONS
from countdown.artifacts import GROUP, MULTIPLIERS, THRESHOLDS, Artifact, Artifacts, Moment
from countdown.compensation import Compensation
from countdown.config import check_choice
from countdown.errors import ConfigError
from countdown.parts import Keeper

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from countdown.selectors import Selector

# Weightings that were called otherwise before, in recipes and profiles.
_RENAMED = {"rms-norm": "column-norm"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A rule that picks the active terms of a sum: of a gated FFN, y = Σ s_i w_i with s = act(g) ⊙ u, the neurons;
    of a linear, z = Σ x_j W[:, j], the input channels.

    A subclass sets the class variables and, if the weightings it offers differ from the usual ones,
    overrides `moments` and `multipliers`.

    Args:
        sparsity: Target share of inactive terms k, 0 ≤ k < 1.
        decision: `threshold` (a term is inactive iff its weighted indicator is ≤ τ, with one τ a module:
            what runs fast) or `topk` (for each token, the ⌊k·h⌋ terms of smallest weighted indicator are
            inactive, ties by lower index first: the papers' "ideal", for evaluation).
        weighting: What the indicator is multiplied by, for each term: `none`; `rms`, the root mean square
            of the factor of s_i that the indicator does not see; `column-norm`, that times ‖w_i‖₂; `shared-norm`, of
            linears, the norm over all columns that one input is multiplied with.
        allocation: A name of `allocation.ALLOCATIONS`: `uniform`, the same target everywhere; `global`, one budget for
            all modules of the entry, spent where calibration measured that it hurts least; `greedy`, of linears, the
            same for every decoder layer, divided within it where its output loses least.

    Raises:
        ConfigError: A setting is out of range or not offered by the method.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    version: ClassVar[int] = 1
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    kind: ClassVar[str] = "ffn"  # of the sites it applies to; see `sites.SITES`
    selector: ClassVar[Selector]
    unseen: ClassVar[str | None]  # the factor of s_i that the indicator does not see
    decisions: ClassVar[Mapping[str, str]] = {"threshold": "", "topk": ""}
    weightings: ClassVar[tuple[str, ...]] = ("none", "rms", "column-norm")
    calibrated: ClassVar[tuple[str, ...]] = ("weighting",)  # settings that a profile is made for

    sparsity: float = 0.5
    decision: str = "threshold"
    weighting: str = "none"
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        """Check every setting against what the method offers."""
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float):
            raise ConfigError(f"sparsity of {self.name} is {self.sparsity!r}, expected a number.")
        if not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"sparsity of {self.name} is {str(self.sparsity)[:20]}, expected 0 ≤ sparsity < 1 "
                "(the share to skip; 0.7 skips 70%)."
            )
        check_choice(f"decision of {self.name}", self.decision, ("threshold", "topk"))
        if self.decision not in self.decisions:
            offered = "; ".join(" ".join(filter(None, pair)) for pair in self.decisions.items())
            raise ConfigError(f"{self.name} does not offer decision '{self.decision}', only: {offered}.")
        object.__setattr__(self, "weighting", _RENAMED.get(str(self.weighting), self.weighting))
        check_choice(f"weighting of {self.name}", self.weighting, self.weightings)
        if self.allocation not in self.allocations():
            ALLOCATIONS.get(str(self.allocation))  # says what is wrong where there is none
        check_choice(f"allocation of {self.name}", self.allocation, self.allocations())

    @classmethod
    def allocations(cls) -> tuple[str, ...]:
        """Return the names of the allocations that apply to its kind of site."""
        return tuple(one.name for one in ALLOCATIONS if one.kinds is None or cls.kind in one.kinds)

    def moments(self) -> tuple[Moment, ...]:
        """Return the moments that calibration must estimate."""
        own = () if self.weighting == "none" or self.unseen is None else (Moment(self.unseen),)
        return (*own, *self.selector.moments)

    @property
    def shares_norms(self) -> bool:
        """Whether sites that read the same input have the same multipliers, and so the same active sets."""
        return self.weighting == "shared-norm"

    def artifacts(self) -> tuple[Artifact, ...]:
        """Return what a profile holds for each of its sites."""
        multipliers = () if self.weighting == "none" else (MULTIPLIERS,)
        group = (GROUP,) if self.shares_norms else ()
        thresholds = (THRESHOLDS,) if "threshold" in self.decisions else ()
        allocated = ALLOCATIONS.get(self.allocation).artifacts
        return (*multipliers, *group, *thresholds, *self.selector.artifacts, *allocated)

    def passes(self) -> tuple[str, ...]:
        """Return the names of the passes over the text that make its artifacts; see `calibration.passes`."""
        thresholds = ("thresholds",) if "threshold" in self.decisions else ()
        return ("moments", *ALLOCATIONS.get(self.allocation).passes, *thresholds)

    @property
    def reads_text(self) -> bool:
        """Whether calibration has anything to estimate from a text."""
        return bool(self.moments()) or self.weighting != "none" or self.passes() != ("moments",)

    def multipliers(self, moments: Mapping[Moment, Tensor], norms: Tensor) -> Tensor | None:
        """Return what the indicator of each term is multiplied by.

        Args:
            moments: For each of `moments()`, its mean, float64 `[terms]`; of `input`, float64 `[inputs]`.
            norms: ‖w_i‖₂, the norms of the columns that are summed, float64 `[terms]`; of all sites that read the same
                input taken together where it `shares_norms`.

        Returns:
            Multipliers m_i ≥ 0, float64 `[terms]`, or None where every one is 1.
        """
        if self.weighting == "none":
            return None
        rms = moments[Moment(self.unseen)].sqrt() if self.unseen else 1.0
        return rms * norms.new_ones(norms.shape) if self.weighting == "rms" else rms * norms

    def check_sites(self, names: Sequence[str]) -> None:
        """Raise ConfigError unless the settings are for the sites of these names."""

    def at(self, name: str, sparsity: float) -> Self:
        """Return the method of one site, by its name, with its share of what is allocated."""
        return replace(self, sparsity=sparsity)

    @classmethod
    def has(cls, setting: str) -> bool:
        """Return whether the method has a setting."""
        return setting in cls.__dataclass_fields__

    @property
    def fitted(self) -> tuple[str, ...]:
        """Other settings that its artifacts are for, with those that it has."""
        return ()

    def disagreement(self, artifacts: Artifacts) -> str | None:
        """Return how artifacts that are each valid do not fit each other, None if they do."""
        return None

    def with_artifacts(self, artifacts: Artifacts) -> Self:
        """Return the method of one site, without what its artifacts do not serve at its sparsity."""
        return self

    @property
    def dropped(self) -> float:
        """The share of inactive terms that it aims at, of one site."""
        return self.sparsity

    @property
    def drops(self) -> tuple[float, ...]:
        """The share of inactive terms that it aims at after each look, of one site; their mean is `dropped`."""
        return (self.dropped,)

    @property
    def one_look(self) -> Self:
        """The method with one look at each term, by which a budget is divided."""
        return self

    @property
    def compensation(self) -> Compensation | None:
        """What is added for inactive terms, of one site; None for nothing."""
        return None

    @property
    def keepers(self) -> dict[str, Keeper]:
        """What keeps parts, of one site, by what it is: `selector`, `compensation`."""
        both: dict[str, Keeper | None] = {"selector": self.selector, "compensation": self.compensation}
        return {name: one for name, one in both.items() if one is not None and one.keeps}

    @property
    def derives(self) -> bool:
        """Whether it derives weights from those of any of its sites: whether something keeps parts there."""
        return self.selector.keeps

    def drop(self, terms: int) -> int:
        """Return ⌊k·h⌋, how many of the `terms` the topk decision makes inactive."""
        # 0.29 * 100 is 28.999999999999996, and means 29.
        return math.floor(round(self.sparsity * terms, 9))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, the method's name and its version, as JSON can hold them."""
        return {"name": self.name, "version": self.version, **asdict(self)}

    @property
    def label(self) -> str:
        """Name and weighting, and the allocation unless uniform, for tables."""
        parts = [self.name if self.weighting == "none" else f"{self.name} × {self.weighting}"]
        return ", ".join(parts if self.allocation == "uniform" else [*parts, self.allocation])

    def __str__(self) -> str:
        return f"{self.label}, {self.decision} at {self.sparsity:g}"
