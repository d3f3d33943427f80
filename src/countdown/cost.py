"""What one decoded token costs in bytes of weights, and what skipping terms can save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from countdown.methods import Method
from countdown.sites import Site
from countdown.sites.decoder import decoder_of


@dataclass(frozen=True)
class TokenBytes:
    """Weight bytes that one decoded token reads in the dense model.

    Args:
        own: In the sites that a method applies to: the gated FFNs, or all linears of the layers.
        other: Elsewhere in the text decoder: attention, norms, the output head. An input embedding that is not also
            the head is left out: a token reads one row of it.
    """

    own: int
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.own + self.other


@dataclass(frozen=True)
class Ceiling:
    """What a method can gain where decoding is bound by reading weights.

    Args:
        method: Its name, or that of a recipe.
        sparsity: Share of inactive terms.
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
    own = sum(site.nbytes for site in sites)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    read = [*decoder_of(model)[0].parameters(), *(head.parameters() if head is not None else ())]
    untied = head is not None and head.weight is not embedding
    # A tied head is the embedding itself, and counts once.
    total = sum(parameter.nbytes for parameter in {id(p): p for p in read}.values())
    # What is held in buffers, as quantised weights are.
    total += sum(site.nbytes for site in sites if not any(list(linear.parameters()) for linear in site.linears))
    return TokenBytes(own, total - own - (embedding.nbytes if untied else 0))


def beside_bytes(sites: Sequence[Site], method: Method) -> int:
    """Return the bytes that a method keeps beside the weights of these sites, those of its kind."""
    return sum(_part_bytes(site, method.at(site.name, method.sparsity)) for site in sites if site.kind == method.kind)


def _part_bytes(site: Site, method: Method) -> int:
    return sum(keeper.part_bytes(site.sum) for keeper in method.keepers.values())


def weights_read(sites: Sequence[Site], method: Method, active: Sequence[float] | None = None) -> float:
    """Return the share of these sites' weight bytes that a token reads.

    Args:
        sites: Some.
        method: Theirs.
        active: The share of their terms that is left after each look; None for what the method aims at.
    """
    read = (_bytes_read(site, method.at(site.name, method.sparsity), active) for site in sites)
    return sum(read) / sum(site.nbytes for site in sites)


def _bytes_read(site: Site, method: Method, active: Sequence[float] | None) -> float:
    sum_, added = site.sum, method.compensation
    left = [1 - share for share in method.drops] if active is None else active
    return method.selector.bytes_read(sum_, left) + (0.0 if added is None else added.bytes_read(sum_, left[-1]))


def saved_bytes(site: Site, method: Method) -> int:
    """Return the bytes of a site's weights that a token saves where none of its terms are active."""
    weights, selector = site.weights, method.selector
    # Adapters that are around them are refused where it matters, by name.
    sum_ = site.sum_class(weights, (None,) * len(weights))
    return round(selector.bytes_read(sum_, [1.0]) - selector.bytes_read(sum_, [0.0]))


def ceiling(bytes_: TokenBytes, parts: Sequence[tuple[Sequence[Site], Method]], name: str) -> Ceiling:
    """Return what a method, or several at one sparsity, can gain by bytes alone.

    Args:
        bytes_: Of a token; its own those of all these sites.
        parts: Sites, and the method that they have.
        name: What the methods are called.
    """
    read = sum(weights_read(sites, one) * sum(s.nbytes for s in sites) for sites, one in parts) / bytes_.own
    return Ceiling(
        method=name,
        sparsity=parts[0][1].sparsity,
        weights_read=read,
        own_speedup=1 / read,
        token_speedup=bytes_.total / (bytes_.other + read * bytes_.own),
    )
