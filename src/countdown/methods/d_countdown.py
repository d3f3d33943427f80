"""D-COUNTDOWN: decide on the coefficient itself."""

from dataclasses import dataclass

from countdown.methods import register
from countdown.methods._predicting import Predicting
from countdown.selectors import COEFFICIENT


@register
@dataclass(frozen=True, kw_only=True)
class DCountdown(Predicting):
    """Keep the neurons with large |s_i|, the direct coefficient (D-COUNTDOWN, EMNLP 2025, arXiv 2505.17701).

    The coefficient is computed exactly, which reads W_gate and W_up densely: the bound on quality that a
    cheap prediction of s can reach (`d-proxy` is one), not a speed-up. Nothing of s_i is unseen, so `rms` has
    nothing to estimate and is not offered; `column-norm` ranks by |s_i|·‖w_i‖₂.
    """

    name = "d-countdown"
    summary = "|s| = |act(g)·u|, the coefficient, computed exactly"
    source = "COUNTDOWN, arXiv 2505.17701"
    selector = COEFFICIENT
    unseen = None
    weightings = ("none", "column-norm")

    decision: str = "topk"
