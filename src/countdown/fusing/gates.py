"""Gated activations, with the projections of both factors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from countdown.fusing.graph import Found, Graph
from countdown.replay import Done, tensors_in

_ACTIVATIONS = {"aten::silu": "silu", "aten::relu": "relu", "aten::gelu": "gelu"}


def gated(graph: Graph, last: Done) -> Iterator[Found]:
    """A gate, activated, times what goes up, of projections of the same token."""
    if last.name != "aten::mul" or len(tensors_in(last.args)) != 2:
        return
    for activated, up in (last.args, last.args[::-1]):
        activation = graph.maker(activated, *_ACTIVATIONS)
        if activation is None:
            continue
        gate = activation.args[0]
        both = graph.origin(gate)
        product = graph.maker(both, "countdown::project")
        if (
            product is None
            or gate.shape != up.shape
            or graph.origin(up) is not both
            or graph.leaves(both, (activation, last))
        ):
            continue
        projections = [_projection(product, both, one) for one in (gate, up)]
        if graph.leaves(activated, (last,)) or any(one is None for one in projections):
            continue
        weights, biases = ([one[place] for one in projections if one] for place in (0, 1))
        args = (product.args[0], weights, biases, _activation_of(activation))
        yield Found(torch.ops.countdown.gated.default, args, (last.made,), (last, activation, product), (last,))


def _activation_of(one: Done) -> str:
    return "gelu_tanh" if one.kwargs.get("approximate") == "tanh" else _ACTIVATIONS[one.name]


def _projection(product: Done, both: Tensor, part: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return the rows of a weight, and of its bias, that make a part of a product."""
    first = part.storage_offset() - both.storage_offset()
    _, weights, biases = product.args
    for weight, bias in zip(weights, biases, strict=True):
        last = first + part.numel()
        if first < len(weight):
            fits = last <= len(weight) and part.is_contiguous()
            return (weight[first:last], None if bias is None else bias[first:last]) if fits else None
        first -= len(weight)
    return None
