"""TEAL and WINA: decide on the inputs of linear layers."""

from dataclasses import dataclass

from countdown.methods import Method, register
from countdown.selectors import INPUT


@register
@dataclass(frozen=True, kw_only=True)
class Teal(Method):
    """Keep the input channels with large |x_j|, in the linears of attention and FFN (TEAL, arXiv 2408.14690).

    Reads of each linear the columns of its active channels: ρ·d·d_out weights, ρ the active share. Thresholds are
    quantiles of |x_j| pooled over tokens, of each linear's own input. Which linears: all of every layer, or those
    that a recipe's pattern names. TEAL's
    greedy allocation over the linears of a layer is allocation `greedy`.
    Weighting `column-norm` ranks by |x_j|·‖W[:, j]‖₂, as WINA does (arXiv 2505.19427), each linear with a mask of its
    own. With `shared-norm` linears that read the same input (q, k and v; gate and up) at the same sparsity have one
    mask, by the root of the sum of their squared norms: the expected error of all of them together.
    """

    name = "teal"
    summary = "|x|, the input channels of any linear"
    source = "TEAL, arXiv 2408.14690; weighted: WINA, arXiv 2505.19427"
    aliases = {"wina": {"weighting": "shared-norm"}}  # noqa: RUF012
    kind = "linear"
    selector = INPUT
    unseen = None
    weightings = ("none", "column-norm", "shared-norm")
