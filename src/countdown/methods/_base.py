"""The base of every method: its settings, what it needs from calibration, its indicator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from countdown.config import check_choice
from countdown.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from countdown.ops.indicators import Indicator

# Names of the factors of a term; see `models.sites`.
Factor = str


@dataclass(frozen=True, kw_only=True)
class Method:
    """A rule that picks the active terms of a sum: of a gated FFN, y = Σ s_i w_i with s = act(g) ⊙ u, the neurons;
    of a linear, z = Σ x_j W[:, j], the input channels.

    A subclass sets the class variables and, if the weightings it offers differ from the usual ones,
    overrides `moments` and `weights`.

    Args:
        sparsity: Target share of inactive terms k, 0 ≤ k < 1.
        decision: `threshold` (a term is inactive iff its weighted indicator is ≤ τ, with one τ a module:
            what runs fast) or `topk` (for each token, the ⌊k·h⌋ terms of smallest weighted indicator are
            inactive, ties by lower index first: the papers' "ideal", for evaluation).
        weighting: What the indicator is multiplied by, for each term: `none`; `rms`, the root mean square
            of the factor of s_i that the indicator does not see; `rms-norm`, that times ‖w_i‖₂.
        allocation: `uniform`, the same target everywhere; `global`, one budget for all modules of the entry, spent
            where calibration measured that it hurts least.

    Raises:
        ConfigError: A setting is out of range or not offered by the method.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    version: ClassVar[int] = 1
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    kind: ClassVar[str] = "ffn"  # what it applies to: `ffn` or `linear`; see `models.sites`
    indicator: ClassVar[Indicator]
    unseen: ClassVar[Factor | None]  # the factor of s_i that the indicator does not see
    decisions: ClassVar[Mapping[str, str]] = {"threshold": "", "topk": ""}
    weightings: ClassVar[tuple[str, ...]] = ("none", "rms", "rms-norm")
    allocations: ClassVar[tuple[str, ...]] = ("uniform", "global")
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
        check_choice(f"weighting of {self.name}", self.weighting, self.weightings)
        check_choice(f"allocation of {self.name}", self.allocation, self.allocations)

    def moments(self) -> tuple[Factor, ...]:
        """Return the factors whose second moments calibration must estimate."""
        own = () if self.weighting == "none" or self.unseen is None else (self.unseen,)
        return (*own, "input") if self.proxy_bits else own

    @property
    def proxy_bits(self) -> int:
        """Bits of the proxy that the indicator is computed from, 0 where it needs none; see `ops.proxy`."""
        return 0

    def weights_read(self, active: float, itemsize: int = 2) -> float:
        """Return the share of the dense weight bytes that is read at this share of active terms.

        Args:
            active: The share.
            itemsize: Bytes of a weight.
        """
        return self.indicator.weights_read(active)

    def weights(self, moments: Mapping[str, Tensor], norms: Tensor) -> Tensor | None:
        """Return what the indicator of each term is multiplied by.

        Args:
            moments: For each name in `moments()`, E[a_i²] (`gate`) or E[u_i²] (`up`), float64 `[terms]`; of an FFN,
                `input` is E[x_j²], float64 `[d]`.
            norms: ‖w_i‖₂, the norms of the columns that are summed, float64 `[terms]`.

        Returns:
            Weights m_i ≥ 0, float64 `[terms]`, or None where every weight is 1.
        """
        if self.weighting == "none":
            return None
        rms = moments[self.unseen].sqrt() if self.unseen else 1.0
        return rms * norms if self.weighting == "rms-norm" else rms * norms.new_ones(norms.shape)

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
