"""Attention, with the rotation of what it reads and the cache that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from countdown.fusing.graph import Found, Graph
from countdown.replay import Done, storage, tensors_in

# Keys and values stand in this dimension of a cache.
_LENGTH = 2


def attention(graph: Graph, last: Done) -> Iterator[Found]:
    """Attention to a cache that a token's key and value are put into before, rotated or not."""
    if last.name != "countdown::attend_one":
        return
    q, keys, values, mask, scale = last.args
    puts = [_put(graph, cache, last) for cache in (keys, values)]
    if puts[0] is None or puts[1] is None or puts[0].args[2] is not puts[1].args[2]:
        return
    (cache, _, at, key), (_, _, _, value) = (put.args for put in puts if put)
    if not (cache.shape == keys.shape and key.shape[_LENGTH] == 1 and key.dtype == keys.dtype == value.dtype):
        return
    parts = [last, *(put for put in puts if put)]
    rotated = [_rotation(graph, one) for one in (q, key)]
    rotation: list[Tensor] = []
    if rotated[0] and rotated[1] and all(a is b for a, b in zip(rotated[0].by, rotated[1].by, strict=True)):
        q, key, rotation = rotated[0].x, rotated[1].x, list(rotated[0].by)
        parts += [*rotated[0].parts, *rotated[1].parts]
    replaced = tuple(parts[:3])
    places = [at]
    if (total := _sum_of_places(graph, at)) is not None:
        # What it adds up is read later than it was.
        places, parts = list(total.args), [*parts, total]
    args = (q, key, value, rotation, keys, values, places, mask, scale)
    yield Found(torch.ops.countdown.attend_next.default, args, (last.made,), tuple(parts), replaced)


def _put(graph: Graph, cache: Tensor, reader: Done) -> Done | None:
    """Return the one operation that puts something into a cache before it is read."""
    writers = [one for one in graph.done if storage(cache) in one.written]
    if len(writers) != 1 or graph.place[id(writers[0])] > graph.place[id(reader)]:
        return None
    (one,) = writers
    whole = one.name == "aten::index_copy_" and one.args[1] in (_LENGTH, _LENGTH - 4) and one.args[2].numel() == 1
    same = whole and one.args[0].data_ptr() == cache.data_ptr() and one.args[0].stride() == cache.stride()
    return one if same else None


def _sum_of_places(graph: Graph, at: Tensor) -> Done | None:
    """Return the sum that a place is of two integers, if it is."""
    one = graph.maker(at, "aten::add")
    if one is None or one.kwargs or len(tensors_in(one.args)) != 2:
        return None
    return one if all(part.numel() == 1 and part.dtype == torch.int64 for part in one.args) else None


@dataclass(frozen=True)
class _Rotated:
    """x · cos + (-second half, first half) · sin, and the operations that compute it."""

    x: Tensor
    by: tuple[Tensor, Tensor]
    parts: tuple[Done, ...]


def _rotation(graph: Graph, tensor: Tensor) -> _Rotated | None:
    total = graph.maker(tensor, "aten::add")
    if total is None or total.kwargs:
        return None
    for (x, cos, one), (turned, sin, other) in _products(graph, total):
        cat = graph.maker(turned, "aten::cat")
        negated = cat and len(cat.args[0]) == 2 and graph.maker(cat.args[0][0], "aten::neg")
        if not cat or not negated:
            continue
        halves = cat.args[0][1], negated.args[0]
        fits = all(angles.numel() == x.shape[-1] and angles.dtype == x.dtype for angles in (cos, sin))
        if fits and cat.args[1:] in ((-1,), (x.dim() - 1,)) and _are_halves(x, *halves):
            return _Rotated(x, (cos, sin), (total, one, other, cat, negated))
    return None


def _products(graph: Graph, total: Done) -> Iterator[tuple[tuple[Tensor, Tensor, Done], ...]]:
    """Yield the factors of two summands that are products, and those, in every order."""
    one, other = (graph.maker(summand, "aten::mul") for summand in total.args[:2])
    if one is None or other is None:
        return
    for first, second in ((one, other), (other, one)):
        for a, b in (first.args, first.args[::-1]):
            for c, d in (second.args, second.args[::-1]):
                if all(isinstance(factor, Tensor) for factor in (a, b, c, d)):
                    yield (a, b, first), (c, d, second)


def _are_halves(x: Tensor, first: Tensor, second: Tensor) -> bool:
    half = x.shape[-1] // 2
    alike = all(part.shape == (*x.shape[:-1], half) and part.stride() == x.stride() for part in (first, second))
    ends = second.data_ptr() == x.data_ptr() + half * x.element_size() * x.stride(-1)
    return alike and x.shape[-1] == 2 * half and first.data_ptr() == x.data_ptr() and ends
