"""D-COUNTDOWN without training: decide on the coefficient that a copy of the layer in few bits computes."""

from dataclasses import dataclass

from countdown.errors import ConfigError
from countdown.methods import register
from countdown.methods._predicting import Predicting
from countdown.selectors import Selector

BITS = (3, 4)


@register
@dataclass(frozen=True, kw_only=True)
class DProxy(Predicting):
    """Keep the neurons with large |ŝ_i|, the coefficient of a 4-bit or 3-bit copy of gate and up; compute them exactly.

    D-COUNTDOWN (EMNLP 2025, arXiv 2505.17701) with a proxy in place of its trained predictor, near Prox
    (arXiv 2607.27591). Reads the proxy, and W_gate, W_up and W_down at the active neurons. The proxy is made from
    the weights when a model is sparsified; a profile holds the mean squares of inputs that it depends on.

    Args:
        bits: 4 or 3.
    """

    name = "d-proxy"
    summary = "|ŝ|, the coefficient of a copy in few bits"
    source = "COUNTDOWN, arXiv 2505.17701, with a quantised proxy"
    unseen = None
    weightings = ("none", "column-norm")
    calibrated = (*Predicting.calibrated, "bits")

    bits: int = 4

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise ConfigError(f"bits of {self.name} is {self.bits!r}, expected {' or '.join(map(str, BITS))}.")

    @property
    def selector(self) -> Selector:  # type: ignore[override]
        from countdown.selectors.copy import COPIES  # loads torch

        return COPIES[self.bits]

    @property
    def label(self) -> str:
        return f"{super().label}, {self.bits} bits"
