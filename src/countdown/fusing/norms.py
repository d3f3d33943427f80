"""RMS norms, with the sum before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from countdown.fusing.graph import Found, Graph
from countdown.replay import Done, tensors_in


def norms(graph: Graph, last: Done) -> Iterator[Found]:
    """An RMS norm, its weight multiplied in before or after rounding, and the sum that it is of."""
    rounded = last.name == "aten::mul"
    product = last if rounded else last.name == "aten::_to_copy" and graph.maker(last.args[0], "aten::mul")
    if not product or len(tensors_in(product.args)) != 2:
        return
    for weight, inner in (product.args, product.args[::-1]):
        found = _normalised(graph, inner, rounded=rounded and inner.dtype != torch.float32)
        if found is None or weight.shape != found.x.shape[-1:] or last.made.dtype != found.x.dtype:
            continue
        # It is fetched before the kernel waits: nothing of the step may make it.
        if not graph.stays(weight) or not weight.is_contiguous():
            continue
        parts = tuple(dict.fromkeys((last, product, *found.parts)))
        more = (weight, found.eps, rounded)
        if added := _added(graph, found.x):
            made = (found.x, last.made)
            together = (*parts, added)
            yield Found(
                torch.ops.countdown.add_and_normalise.default, (*added.args, *more), made, together, (last, added)
            )
        yield Found(torch.ops.countdown.normalise.default, (found.x, *more), (last.made,), parts, (last,))


def _added(graph: Graph, x: Tensor) -> Done | None:
    """Return the sum that x is of two tensors like it, if it is."""
    one = graph.maker(x, "aten::add")
    alike = one is not None and not one.kwargs and len(one.args) == 2
    if not alike or not all(_like(summand, x) for summand in one.args):  # type: ignore[union-attr]
        return None
    return one


def _like(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype


@dataclass(frozen=True)
class _Normalised:
    """x · (mean of x² + eps)^-1/2, and the operations that compute it."""

    x: Tensor
    eps: float
    parts: tuple[Done, ...]


def _normalised(graph: Graph, inner: Any, *, rounded: bool) -> _Normalised | None:
    back = graph.maker(inner, "aten::_to_copy") if rounded else None
    if rounded and back is None:
        return None
    scaled = graph.maker(inner if back is None else back.args[0], "aten::mul")
    if scaled is None:
        return None
    for whole, root in (scaled.args, scaled.args[::-1]):
        found = _root_of_mean(graph, root, whole)
        if found is None:
            continue
        eps, parts = found
        cast = graph.maker(whole, "aten::_to_copy")
        x = whole if cast is None or whole.dtype != torch.float32 else cast.args[0]
        return _Normalised(x, eps, tuple(one for one in (back, scaled, *parts, cast) if one is not None))
    return None


def _root_of_mean(graph: Graph, root: Any, whole: Any) -> tuple[float, tuple[Done, ...]] | None:
    inverse = graph.maker(root, "aten::rsqrt")
    shifted = inverse and graph.maker(inverse.args[0], "aten::add")
    mean = shifted and graph.maker(shifted.args[0], "aten::mean")
    square = mean and graph.maker(mean.args[0], "aten::pow")
    if not (inverse and shifted and mean and square):
        return None
    eps = shifted.args[1]
    over_rows = mean.args[1:] in (([-1], True), ([whole.dim() - 1], True)) and not mean.kwargs
    if not over_rows or not isinstance(eps, float) or square.args[0] is not whole or square.args[1] != 2:
        return None
    return eps, (inverse, shifted, mean, square)
