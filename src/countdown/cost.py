"""What one decoded token costs in bytes of weights, and what skipping neurons can save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from countdown.methods import Method
from countdown.models.ffn import GatedFFN


@dataclass(frozen=True)
class TokenBytes:
    """Weight bytes that one decoded token reads in the dense model.

    Args:
        ffn: In the gated FFNs.
        other: Elsewhere: attention, norms, the output head. An input embedding that is not also the head is
            left out: a token reads one row of it.
    """

    ffn: int
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.ffn + self.other


@dataclass(frozen=True)
class Ceiling:
    """What a method can gain where decoding is bound by reading weights.

    Args:
        method: Its name.
        sparsity: Share of inactive neurons.
        weights_read: Share of the FFN's weight bytes read.
        ffn_speedup: 1 / weights_read.
        token_speedup: Over the whole token, everything outside the FFNs unchanged.
    """

    method: str
    sparsity: float
    weights_read: float
    ffn_speedup: float
    token_speedup: float


def token_bytes(model: nn.Module, ffns: Sequence[GatedFFN]) -> TokenBytes:
    """Count the weight bytes of one decoded token."""
    ffn = sum(linear.weight.nbytes for site in ffns for linear in site.linears)
    total = sum(parameter.nbytes for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    untied = head is not None and head.weight is not embedding
    return TokenBytes(ffn, total - ffn - (embedding.nbytes if untied else 0))


def ceiling(bytes_: TokenBytes, method: type[Method], sparsity: float) -> Ceiling:
    """Return what `method` can gain at `sparsity`, by bytes alone."""
    read = method.indicator.weights_read(1 - sparsity)
    return Ceiling(
        method=method.name,
        sparsity=sparsity,
        weights_read=read,
        ffn_speedup=1 / read,
        token_speedup=bytes_.total / (bytes_.other + read * bytes_.ffn),
    )
