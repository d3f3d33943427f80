"""CATS: decide on the activated gate."""

from dataclasses import dataclass

from countdown.methods import register
from countdown.methods._looking import Looking
from countdown.selectors import GATE


@register
@dataclass(frozen=True, kw_only=True)
class Cats(Looking):
    """Keep the neurons with large |a_i| = |act(g_i)| (CATS, arXiv 2404.08763).

    Reads W_gate densely, W_up and W_down at the active neurons. Weighting `rms` ranks by |a_i|·√E[u_i²]: the
    FFN part of CHESS (arXiv 2409.01366), whose whole is the recipe `chess`.
    """

    name = "cats"
    summary = "|act(g)|, the activated gate"
    source = "CATS, arXiv 2404.08763; weighted: CHESS, arXiv 2409.01366"
    selector = GATE
    unseen = "up"
