"""Artifacts: the tensors that calibration leaves for a site, each declared once.

The declaration is what validates an artifact when a profile is loaded, names it where it is saved, and says along
which axes it could be sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A curve has a point for each thousandth of sparsity.
POINTS = 1000
# Axes of a size that is known with the tensor alone.
FREE = ("fits", "packed", "groups")
# Of one site, by name.
Artifacts = Mapping[str, "Tensor"]


def non_negative(values: Tensor) -> str | None:
    """Return what is wrong where an entry is below 0."""
    return None if bool((values >= 0).all()) else "are negative"


def curve_from(first: float) -> Callable[[Tensor], str | None]:
    """Return a check that a curve begins at a value and never falls."""

    def check(curve: Tensor) -> str | None:
        if float(curve[0]) != first:
            return "begin elsewhere"
        return None if bool((curve.diff() >= 0).all()) else "fall"

    return check


def increasing(values: Tensor) -> str | None:
    """Return what is wrong where sparsities do not ascend between 0 and 1."""
    inside = bool(((values > 0) & (values < 1)).all()) and len(values) > 0
    return None if inside and bool((values.diff() > 0).all()) else "do not ascend between 0 and 1"


def at_least(smallest: float) -> Callable[[Tensor], str | None]:
    """Return a check that no entry is below a number."""
    return lambda values: None if bool((values >= smallest * (1 - 1e-6)).all()) else f"are below {smallest:g}"


def whole(number: Tensor) -> str | None:
    """Return what is wrong where an entry is not a whole number of 0 or more."""
    return None if bool((number >= 0).all()) and bool((number == number.floor()).all()) else "are no whole numbers"


@dataclass(frozen=True)
class Moment:
    """A mean over calibration tokens, in the dense model, of a power of a factor of each term.

    Args:
        factor: A factor of the site's sum (`gate` or `up` of an FFN), or `input`, the entries of its input.
        order: 1 for the mean, 2 for the mean square.
    """

    factor: str
    order: int = 2


@dataclass(frozen=True)
class Artifact:
    """A tensor of finite numbers that a method needs of each of its sites.

    Args:
        name: Its name in profiles.
        axes: What each of its dimensions counts: `terms`, `inputs` or `outputs` of the site (an axis of these is cut
            where the site's weights are sharded), `points` of a curve, or one of `FREE`, known with the tensor alone.
        check: Returns what is wrong with the values, as the end of a sentence, or None.
        optional: Whether a profile may lack it.
        dtype: Its own.
    """

    name: str
    axes: tuple[str, ...]
    check: Callable[[Tensor], str | None] = lambda _: None
    optional: bool = False
    dtype: str = "float32"

    def problem(self, value: Tensor | None, sizes: Mapping[str, int]) -> str | None:
        """Return what is wrong with a value, None if nothing is.

        Args:
            value: The tensor, None where there is none.
            sizes: Of the axes of the site.
        """
        if value is None:
            return None if self.optional else "are missing"
        expected = tuple(None if axis in FREE else sizes[axis] for axis in self.axes)
        found = tuple(value.shape)
        if len(found) != len(expected) or any(e not in (None, n) for n, e in zip(found, expected, strict=True)):
            return f"have shape {found}, expected {tuple('any' if e is None else e for e in expected)}"
        if str(value.dtype) != f"torch.{self.dtype}" or not bool(value.isfinite().all()):
            return f"are not {self.dtype} or not finite"
        return self.check(value)


def shares(curve: Tensor) -> str | None:
    """Return what is wrong where a curve of sparsities does not begin at 0, falls, or leaves no term."""
    return curve_from(0.0)(curve) or ("reach 1" if bool((curve >= 1).any()) else None)


def value_at(curve: Tensor, sparsity: float) -> float:
    """Return the value of a curve, `[POINTS]`, at a sparsity: its first at 0, past its last point that one."""
    if sparsity == 0:
        return float(curve[0])
    position = min(sparsity * len(curve), len(curve) - 1)
    # The first point stands for "nothing dropped"; below one step it is 0, the smallest magnitude.
    low, high = curve.clamp(min=0)[[int(position), min(int(position) + 1, len(curve) - 1)]].tolist()
    return float(low + (high - low) * (position - int(position)))


# What the indicator of each term is multiplied by.
MULTIPLIERS = Artifact("multipliers", ("terms",), non_negative)
# τ at sparsities 0, 0.001, ..., 0.999.
THRESHOLDS = Artifact("thresholds", ("points",), curve_from(-1.0), optional=True)
# The τ of a second look, where the site's sparsity, that of both looks together, is 0, 0.001, ..., 0.999.
SECOND_THRESHOLDS = Artifact("second_thresholds", ("points",), curve_from(-1.0))
# What a second look multiplies coefficients by: the norms of the columns that are summed.
NORMS = Artifact("norms", ("terms",), non_negative)
# The estimated error of the output at those sparsities.
ERRORS = Artifact("errors", ("points",), curve_from(0.0), optional=True)
# The site's own sparsity at those of what it is allocated with.
PATH = Artifact("path", ("points",), shares, optional=True)
# The number of the sites that share active sets with it, for they read one input: the same for all of them.
GROUP = Artifact("group", (), whole, optional=True)
# Mean squares of the entries of the input.
IMPORTANCE = Artifact("importance", ("inputs",), non_negative)
