"""TEAL: decide on the inputs of linear layers."""

from dataclasses import dataclass

from countdown.methods import Method, register
from countdown.ops.indicators import INPUT


@register
@dataclass(frozen=True, kw_only=True)
class Teal(Method):
    """Keep the input channels with large |x_j|, in the linears of attention and FFN (TEAL, arXiv 2408.14690).

    Reads of each linear the columns of its active channels: ρ·d·d_out weights, ρ the active share. Thresholds are
    quantiles of |x_j| pooled over tokens, of each linear's own input. Which linears: all of every layer, or those
    that a recipe's pattern names. TEAL's greedy allocation over a block's linears is not included.
    """

    name = "teal"
    summary = "|x|, the input channels of any linear"
    source = "TEAL, arXiv 2408.14690"
    kind = "linear"
    indicator = INPUT
    unseen = None
    weightings = ("none",)
    allocations = ("uniform",)
