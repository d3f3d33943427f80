"""M-COUNTDOWN: decide on the up projection."""

from dataclasses import dataclass

from countdown.methods import register
from countdown.methods._looking import Looking
from countdown.selectors import UP


@register
@dataclass(frozen=True, kw_only=True)
class MCountdown(Looking):
    """Keep the neurons with large |u_i|, the indirect coefficient (M-COUNTDOWN, EMNLP 2025, arXiv 2505.17701).

    Reads W_up densely, W_gate and W_down at the active neurons: (1 + 2ρ)·d·h weights, ρ the active share.
    Weighting `rms` ranks by |u_i|·√E[a_i²], the expected size of s_i when only u_i is known; it costs
    nothing at run time, where it is a threshold for each neuron.
    """

    name = "m-countdown"
    summary = "|u|, the up projection"
    source = "COUNTDOWN, arXiv 2505.17701"
    selector = UP
    unseen = "gate"
