"""FFNs and attention together: a proxy picks neurons, WINA the input channels of all other linears, on one budget."""

from countdown.methods import NamedRecipe, register

D_PROXY_WINA = register(
    NamedRecipe(
        name="d-proxy+wina",
        summary="d-proxy on the FFNs, wina on attention's linears, one budget of bytes for both",
        source="COUNTDOWN, arXiv 2505.17701, with a quantised proxy; WINA, arXiv 2505.19427",
        # Linears inside of an FFN belong to it, so what is left is attention's.
        entries=({"method": "d-proxy"}, {"method": "wina"}),
        allocation="global",
    )
)
