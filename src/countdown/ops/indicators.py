"""Indicators: what is compared for each neuron or input channel to decide whether it is active.

An op receives an indicator by name, so that a compiled backend can recognise the ones it has a kernel for
and leave the rest to the reference. This file needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from countdown.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Projection = Literal["gate", "up"]


@dataclass(frozen=True)
class Indicator:
    """A non-negative number for each token and term; the small ones are dropped.

    Args:
        name: The name under which ops receive it.
        reads: The projections that must be computed for all terms before anything can be dropped. They are read
            densely, the other matrices only at the active terms.
        formula: From the factors of the terms, each float32 `[..., terms]`, to the indicator, likewise: for an FFN
            from a = act(g) and u, for a linear from its input x.
    """

    name: str
    reads: tuple[Projection, ...]
    formula: Callable[..., Tensor]

    def weights_read(self, active: float) -> float:
        """Return the share of the dense weight bytes that is read at this share of active terms."""
        dense = len(self.reads)
        return (dense + (3 - dense) * active) / 3


UP = Indicator("up", reads=("up",), formula=lambda a, u: u.abs())
GATE = Indicator("gate", reads=("gate",), formula=lambda a, u: a.abs())
COEFFICIENT = Indicator("coefficient", reads=("gate", "up"), formula=lambda a, u: (a * u).abs())
# As COEFFICIENT, of what a proxy of gate and up computes; see `ops.proxy`.
PROXY = Indicator("proxy", reads=(), formula=lambda a, u: (a * u).abs())
INPUT = Indicator("input", reads=(), formula=lambda x: x.abs())

_INDICATORS = {indicator.name: indicator for indicator in (UP, GATE, COEFFICIENT, PROXY, INPUT)}


def register_indicator(indicator: Indicator) -> None:
    """Make `indicator` known to the ops. Registering the same one again changes nothing.

    Raises:
        ConfigError: Another indicator has this name.
    """
    known = _INDICATORS.setdefault(indicator.name, indicator)
    if known != indicator:
        raise ConfigError(f"an indicator named '{indicator.name}' is registered already; choose another name.")


def get_indicator(name: str) -> Indicator:
    """Return the indicator of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in _INDICATORS:
        raise ConfigError(f"indicator is '{name}', expected one of: {', '.join(_INDICATORS)}.")
    return _INDICATORS[name]
