"""R-Sparse: whole input channels for what is large, a low-rank copy of the weight for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from countdown.artifacts import Moment
from countdown.compensation import Compensation, kept
from countdown.errors import ConfigError
from countdown.methods import Method, register
from countdown.selectors import INPUT

if TYPE_CHECKING:
    from torch import Tensor

Alphas = tuple[tuple[str, float], ...]


@register
@dataclass(frozen=True, kw_only=True)
class RSparse(Method):
    """Keep the largest input channels; the truncated SVD of the weight stands for others (R-Sparse, ICLR 2025).

    z = W (x ⊙ m) + A B (x ⊙ ¬m) (arXiv 2504.19449, section 3). Of a linear's (1 - sparsity)·d·d_out weights the share α
    are whole channels, c = ⌊d·(1 - sparsity)·α⌋ of them; the rest pays for the rank of A B,
    ⌊((1 - sparsity)·d·d_out - c·d_out) / (d + d_out)⌋. With α = 1 there is no A B, and this is `teal`. More terms are
    inactive than `sparsity` says: 1 - α·(1 - sparsity) of them.
    Reads c·d_out + rank·(d - c + d_out) weights of each linear, since columns of B at kept channels are left out.
    A and B are made from the weights when a model is sparsified.

    Args:
        alpha: α of every linear, 0 ≤ α ≤ 1; or by name of a module, or pattern of names, in order: the first that
            matches a linear has it, and every linear must have one. The search finds such a list.
        weighting: `by-alpha`, as published: |x_j| where α is 1, else |x_j|·‖W[:, j]‖₂. Or one of the two everywhere.

    Raises:
        ConfigError: See `Method`; α is out of range or of another kind.
    """

    name = "r-sparse"
    summary = "|x|, and a low-rank copy for the other channels"
    source = "R-Sparse, arXiv 2504.19449"
    kind = "linear"
    selector = INPUT
    unseen = None
    weightings = ("by-alpha", "none", "column-norm")
    calibrated = ("weighting", "alpha")

    weighting: str = "by-alpha"
    alpha: float | Alphas = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        alpha: Any = self.alpha
        if isinstance(alpha, Mapping):
            alpha = alpha.items()
        if not isinstance(alpha, str) and hasattr(alpha, "__iter__"):
            object.__setattr__(self, "alpha", tuple(_pair(one) for one in alpha))
        for _, value in self._alphas:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(
                    f"alpha of {self.name} is {str(value)[:20]}, expected 0 ≤ alpha ≤ 1, the share of the budget "
                    "for whole channels."
                )

    @classmethod
    def allocations(cls) -> tuple[str, ...]:
        # Estimates of the others know nothing of the low-rank term.
        return ("uniform",)

    @property
    def _alphas(self) -> Alphas:
        return self.alpha if isinstance(self.alpha, tuple) else (("*", self.alpha),)

    def check_sites(self, names: Sequence[str]) -> None:
        """See `Method.check_sites`: α of other linears, or of some only, is of another model."""
        for name in names:
            self.at(name, self.sparsity)
        for pattern, _ in self._alphas:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"alpha of {self.name} is given for '{pattern}', which is none of the linears it applies to "
                    f"({names[0]}, …, {names[-1]}): was it found for another model?"
                )

    def at(self, name: str, sparsity: float) -> RSparse:
        """See `Method.at`."""
        found = next((value for pattern, value in self._alphas if fnmatchcase(name, pattern)), None)
        if found is None:
            raise ConfigError(
                f"alpha of {self.name} is given for some linears, not for {name}; add '*' for all others."
            )
        return replace(self, sparsity=sparsity, alpha=found)

    @property
    def own_alpha(self) -> float:
        """α of the one linear that `at` made the method of."""
        assert not isinstance(self.alpha, tuple), self.alpha
        return self.alpha

    @property
    def dropped(self) -> float:
        """See `Method.dropped`."""
        return 1 - self.own_alpha * (1 - self.sparsity)

    def drop(self, terms: int) -> int:
        """Return d - c, how many input channels topk makes inactive."""
        return terms - kept(terms, self.sparsity, self.own_alpha)

    @property
    def compensation(self) -> Compensation | None:
        """See `Method.compensation`."""
        from countdown.compensation.svd import DroppedSvd  # loads torch

        return None if self.own_alpha == 1 else DroppedSvd(self.sparsity, self.own_alpha)

    @property
    def derives(self) -> bool:
        """See `Method.derives`."""
        return any(value < 1 for _, value in self._alphas)

    def multipliers(self, moments: Mapping[Moment, Tensor], norms: Tensor) -> Tensor | None:
        """See `Method.multipliers`."""
        if self.weighting == "none":
            return None
        return norms.new_ones(norms.shape) if self.weighting == "by-alpha" and self.own_alpha == 1 else norms

    def to_dict(self) -> dict[str, Any]:
        """See `Method.to_dict`; α by name as a mapping."""
        alpha = dict(self.alpha) if isinstance(self.alpha, tuple) else self.alpha
        return {**super().to_dict(), "alpha": alpha}

    @property
    def label(self) -> str:
        weighting = "" if self.weighting == "by-alpha" else f" × {self.weighting}"
        if not isinstance(self.alpha, tuple):
            return f"{self.name}{weighting}, α {self.alpha:g}"
        low, high = min(value for _, value in self.alpha), max(value for _, value in self.alpha)
        return f"{self.name}{weighting}, α {low:g} to {high:g} by linear"


def _pair(one: Any) -> tuple[str, float]:
    if isinstance(one, list | tuple) and len(one) == 2 and isinstance(one[0], str):
        return one[0], one[1]
    raise ConfigError(f"alpha of r-sparse is {str(one)[:40]}, expected a number, or a mapping from names to numbers.")
