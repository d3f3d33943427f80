"""What one decoded token costs in bytes of weights, and what skipping neurons can save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from countdown.methods import Method
from countdown.models.sites import GatedFFN, Site
from countdown.ops.proxy_format import proxy_bytes as of_ffn


@dataclass(frozen=True)
class TokenBytes:
    """Weight bytes that one decoded token reads in the dense model.

    Args:
        own: In the sites that a method applies to: the gated FFNs, or all linears of the layers.
        other: Elsewhere in the text decoder: attention, norms, the output head. An input embedding that is not also
            the head is left out: a token reads one row of it.
        itemsize: Bytes of one of the sites' weights.
    """

    own: int
    other: int
    itemsize: int = 2

    @property
    def total(self) -> int:
        """All of them."""
        return self.own + self.other


@dataclass(frozen=True)
class Ceiling:
    """What a method can gain where decoding is bound by reading weights.

    Args:
        method: Its name.
        sparsity: Share of inactive neurons.
        weights_read: Share of those sites' weight bytes read.
        own_speedup: 1 / weights_read.
        token_speedup: Over the whole token, everything outside those sites unchanged.
    """

    method: str
    sparsity: float
    weights_read: float
    own_speedup: float
    token_speedup: float


def token_bytes(model: nn.Module, sites: Sequence[Site]) -> TokenBytes:
    """Count the weight bytes of one decoded token."""
    own = sum(matrix.nbytes for site in sites for matrix in site.matrices)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    read = [*model.get_decoder().parameters(), *(head.parameters() if head is not None else ())]  # type: ignore[operator]
    untied = head is not None and head.weight is not embedding
    # A tied head is the embedding itself, and counts once.
    total = sum(parameter.nbytes for parameter in {id(p): p for p in read}.values())
    return TokenBytes(own, total - own - (embedding.nbytes if untied else 0), sites[0].matrices[0].itemsize)


def proxy_bytes(sites: Sequence[Site], method: type[Method] | Method) -> int:
    """Return the bytes that a method keeps beside the weights of these sites, those of its kind."""
    bits = (method() if isinstance(method, type) else method).proxy_bits
    ffns = [site for site in sites if isinstance(site, GatedFFN)] if bits else []
    return sum(of_ffn(ffn.h, ffn.d, bits) for ffn in ffns)


def ceiling(bytes_: TokenBytes, method: type[Method], sparsity: float) -> Ceiling:
    """Return what `method` can gain at `sparsity`, by bytes alone."""
    read = method().weights_read(1 - sparsity, bytes_.itemsize)
    return Ceiling(
        method=method.name,
        sparsity=sparsity,
        weights_read=read,
        own_speedup=1 / read,
        token_speedup=bytes_.total / (bytes_.other + read * bytes_.own),
    )
