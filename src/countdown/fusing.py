"""Operations of a recorded step that belong together, put together: for a GPU, where each takes as long as a kernel.

A norm is eight operations of torch, a rotation five, and a layer has thirty. What is found among them becomes one op of
`ops.dense`: norms with the sum before them, gated activations with their projections, attention with the rotation of
what it reads and the cache that it writes; and counters are counted up together. All else is done as it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from countdown.ops import backends  # noqa: F401  (registers the ops)
from countdown.replay import Done, changed, operations, storage, tensors_in

_ours = torch.ops.countdown
_ACTIVATIONS = {"aten::silu": "silu", "aten::relu": "relu", "aten::gelu": "gelu"}
_SPARSE = {"countdown::sparse", "countdown::sparse_together", "countdown::given"}
# Its keys and values stand in this dimension of a cache.
_LENGTH = 2


def fused(step: Callable[[], object], results: Callable[[], list[Tensor]]) -> Fused:
    """Return a step as the operations it does, with what belongs together put together, after two runs.

    What no step changes is taken to stay as it is: what follows from it is not computed again.

    Args:
        step: What to do again.
        results: Returns, after a run, tensors that it made.

    Returns:
        A call that does it again and returns the new results, in memory of their own.

    Raises:
        UnsupportedModelError: What it does depends on the values of tensors, or differs from one run to the next.
    """
    done, wanted = operations(step), results()
    changing = changed(done)
    done = [one for one in done if one.written or any(storage(tensor) in changing for tensor in tensors_in(one.made))]
    done = _counted_last(done)
    for find in (_gated, _attention, _norm, _angles):
        done = _put_together(find, done, wanted)
    return Fused(_apart_from_sparse(_needed(done, wanted), wanted), wanted)


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor that an operation makes."""

    number: int


@dataclass
class Operation:
    """An operation of a step, which holds none of the tensors that a step makes.

    Args:
        name: Its name, such as `aten::mul`.
        op, args, kwargs: What to call, slots in place of what is made.
        makes: For each tensor that it returns the slot and shape; None for one that it was given and has changed.
        computes: It makes or changes something; else it returns views.
        drops: The slots that nobody reads any more.
    """

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    makes: list[tuple[_Slot, torch.Size] | None]
    computes: bool
    drops: list[_Slot] = field(default_factory=list)


class Fused:
    """Operations that are done again, with what is there now, when it is called; it returns the results.

    Args:
        done: As they were recorded and put together.
        results: Tensors that they made.
    """

    def __init__(self, done: Sequence[Done], results: Sequence[Tensor]) -> None:
        slots: dict[int, _Slot] = {}

        def named(tensor: Tensor) -> Tensor | _Slot:
            return slots.get(id(tensor), tensor)

        self.operations = []
        for one in done:
            args, kwargs = tree_map_only(Tensor, named, (one.args, one.kwargs))
            given = {id(tensor) for tensor in tensors_in((one.args, one.kwargs))}
            makes: list[tuple[_Slot, torch.Size] | None] = []
            for tensor in tensors_in(one.made):
                if id(tensor) in given:
                    makes.append(None)
                    continue
                slots[id(tensor)] = _Slot(len(slots))
                makes.append((slots[id(tensor)], tensor.shape))
            self.operations.append(
                Operation(one.name, one.op, args, kwargs, makes, computes=bool(one.new or one.written))
            )
        self._results = [named(tensor) for tensor in results]
        self._drop_early()

    def _drop_early(self) -> None:
        later = {slot for slot in self._results if isinstance(slot, _Slot)}
        for one in reversed(self.operations):
            used = {leaf for leaf in tree_leaves((one.args, one.kwargs)) if isinstance(leaf, _Slot)}
            used |= {where[0] for where in one.makes if where}
            one.drops = sorted(used - later, key=lambda slot: slot.number)
            later |= used

    def __call__(self) -> list[Tensor]:
        now: dict[_Slot, Tensor] = {}
        for one in self.operations:
            args, kwargs = tree_map_only(_Slot, now.__getitem__, (one.args, one.kwargs))
            for where, made in zip(one.makes, tensors_in(one.op(*args, **kwargs)), strict=True):
                if where is not None:
                    now[where[0]] = made.view(where[1])
            for slot in one.drops:
                del now[slot]
        return [now[one] if isinstance(one, _Slot) else one for one in self._results]


@dataclass(frozen=True)
class _Found:
    """Operations that are one.

    Args:
        op: What they are.
        args: Its arguments.
        made: What it makes, of what they made.
        parts: All of them, the last first.
        replaced: Those whose results `made` has; the others stay where somebody else reads theirs.
    """

    op: Any
    args: tuple[Any, ...]
    made: tuple[Tensor, ...]
    parts: tuple[Done, ...]
    replaced: tuple[Done, ...]


class _Graph:
    """Who makes and who reads the tensors of a step."""

    def __init__(self, done: Sequence[Done], results: Sequence[Tensor]) -> None:
        self.done, self.results = done, {id(tensor) for tensor in results}
        self.place = {id(one): place for place, one in enumerate(done)}
        self._makers = {id(tensor): one for one in done for tensor in tensors_in(one.made)}
        self._readers: dict[int, list[Done]] = {}
        for one in done:
            for tensor in tensors_in((one.args, one.kwargs)):
                self._readers.setdefault(id(tensor), []).append(one)

    def maker(self, tensor: Any, *names: str) -> Done | None:
        """Return the operation that made it, if it is one of these."""
        one = self._makers.get(id(tensor))
        return one if one is not None and one.name in names else None

    def stays(self, tensor: Tensor) -> bool:
        """Return whether no operation of the step makes it."""
        return id(tensor) not in self._makers

    def origin(self, tensor: Tensor) -> Tensor:
        """Return the tensor that it is a view of, or itself."""
        one = self._makers.get(id(tensor))
        if one is None or one.new or one.written or not tensors_in(one.args):
            return tensor
        return self.origin(tensors_in(one.args)[0])

    def readers(self, tensor: Tensor) -> set[Done]:
        """Return the operations that read it or a view of it, and are none themselves."""
        found = set()
        for one in self._readers.get(id(tensor), []):
            if one.new or one.written:
                found.add(one)
                continue
            for view in tensors_in(one.made):
                found |= self.readers(view)
        return found

    def leaves(self, tensor: Tensor, only: Sequence[Done]) -> bool:
        """Return whether others than these operations read it, or it is a result."""
        return bool(self.readers(tensor) - set(only)) or id(tensor) in self.results

    def fits(self, found: _Found) -> bool:
        """Return whether it can be done where the last of its operations is."""
        last = self.place[id(found.parts[0])]
        first = min(self.place[id(one)] for one in found.parts)
        between = [one for one in self.done[first:last] if one not in found.parts]
        written = {place for one in found.replaced for place in one.written}
        between_them = [tensor for one in found.parts for tensor in tensors_in(one.made)]
        touched = {storage(tensor) for tensor in (*tensors_in(found.args), *between_them)}
        # What is read stays as it is meanwhile, and what is written nobody looks at.
        if any(one.written & touched or one.read & written for one in between if one.new or one.written):
            return False
        early = {reader for tensor in found.made for reader in self.readers(tensor)} - set(found.parts)
        return all(self.place[id(reader)] > last for reader in early)


def _put_together(
    find: Callable[[_Graph, Done], Iterator[_Found]], done: Sequence[Done], results: Sequence[Tensor]
) -> list[Done]:
    """Return the operations with those that `find` knows by their last one, the best first, as one each."""
    graph = _Graph(done, results)
    instead: dict[int, Done] = {}
    gone: set[int] = set()
    for one in done:
        possible = (found for found in find(graph, one) if not gone & {id(part) for part in found.replaced})
        found = next((found for found in possible if graph.fits(found)), None)
        if found is None:
            continue
        instead[id(one)] = Done(found.op, found.args, {}, found.made, [])
        gone |= {id(part) for part in found.replaced}
    return [instead.get(id(one), one) for one in done if id(one) in instead or id(one) not in gone]


def _apart_from_sparse(done: Sequence[Done], results: Sequence[Tensor]) -> list[Done]:
    """Return the operations, those without `overlap` that sparse sums read."""
    graph = _Graph(done, results)
    small = (_ours.normalise.default, _ours.add_and_normalise.default, _ours.attend_next.default)

    def apart(one: Done) -> Done:
        readers = {reader.name for tensor in tensors_in(one.made) for reader in graph.readers(tensor)}
        if one.op not in small or not readers & _SPARSE:
            return one
        return replace(one, args=(*one.args, False))

    return [apart(one) for one in done]


def _needed(done: Sequence[Done], results: Sequence[Tensor]) -> list[Done]:
    """Return the operations without those that make what nobody reads."""
    wanted, kept = {id(tensor) for tensor in results}, []
    for one in reversed(done):
        if one.written or any(id(tensor) in wanted for tensor in tensors_in(one.made)):
            kept.append(one)
            wanted |= {id(tensor) for tensor in tensors_in((one.args, one.kwargs))}
    return kept[::-1]


def _counted_last(done: Sequence[Done]) -> list[Done]:
    """Return the operations with the counters that nobody reads any more counted up together, at the end."""
    counting: dict[int, list[Done]] = {}
    later: set[int] = set()
    for one in reversed(done):
        if _counts(one) and not one.written & later:
            counting.setdefault(one.args[1], []).append(one)
            later |= one.written  # once is enough
        elif one.new or one.written:
            later |= one.read
    gone = {id(one) for some in counting.values() for one in some}
    kept = [one for one in done if id(one) not in gone]
    for number, some in counting.items():
        op = torch.ops.aten._foreach_add_.Scalar
        kept.append(Done(op, ([one.args[0] for one in some], number), {}, None, []))
    return kept


def _counts(one: Done) -> bool:
    if one.name != "aten::add_" or one.kwargs or not isinstance(one.args[1], int):
        return False
    counter: Tensor = one.args[0]
    return counter.dtype == torch.int64 and counter.numel() == 1


def _norm(graph: _Graph, last: Done) -> Iterator[_Found]:
    """An RMS norm, its weight multiplied in before or after rounding, and the sum that it is of."""
    rounded = last.name == "aten::mul"
    product = last if rounded else last.name == "aten::_to_copy" and graph.maker(last.args[0], "aten::mul")
    if not product or len(tensors_in(product.args)) != 2:
        return
    for weight, inner in (product.args, product.args[::-1]):
        found = _normalised(graph, inner, rounded=rounded and inner.dtype != torch.float32)
        fits = found is not None and weight.shape == found.x.shape[-1:] and graph.stays(weight)
        fits = (
            fits and weight.is_contiguous()
        )  # a copy would be made in the step, and is fetched before it is waited for
        if found is None or not fits or last.made.dtype != found.x.dtype:
            continue
        parts = tuple(dict.fromkeys((last, product, *found.parts)))
        more = (weight, found.eps, rounded)
        if added := _added(graph, found.x):
            made = (found.x, last.made)
            together = (*parts, added)
            yield _Found(_ours.add_and_normalise.default, (*added.args, *more), made, together, (last, added))
        yield _Found(_ours.normalise.default, (found.x, *more), (last.made,), parts, (last,))


def _added(graph: _Graph, x: Tensor) -> Done | None:
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


def _normalised(graph: _Graph, inner: Any, *, rounded: bool) -> _Normalised | None:
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


def _root_of_mean(graph: _Graph, root: Any, whole: Any) -> tuple[float, tuple[Done, ...]] | None:
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


def _gated(graph: _Graph, last: Done) -> Iterator[_Found]:
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
        yield _Found(_ours.gated_one.default, args, (last.made,), (last, activation, product), (last,))


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


def _attention(graph: _Graph, last: Done) -> Iterator[_Found]:
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
    yield _Found(_ours.attend_next.default, args, (last.made,), tuple(parts), replaced)


def _put(graph: _Graph, cache: Tensor, reader: Done) -> Done | None:
    """Return the one operation that puts something into a cache before it is read."""
    writers = [one for one in graph.done if storage(cache) in one.written]
    if len(writers) != 1 or graph.place[id(writers[0])] > graph.place[id(reader)]:
        return None
    (one,) = writers
    whole = one.name == "aten::index_copy_" and one.args[1] in (_LENGTH, _LENGTH - 4) and one.args[2].numel() == 1
    same = whole and one.args[0].data_ptr() == cache.data_ptr() and one.args[0].stride() == cache.stride()
    return one if same else None


def _sum_of_places(graph: _Graph, at: Tensor) -> Done | None:
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


def _rotation(graph: _Graph, tensor: Tensor) -> _Rotated | None:
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


def _products(graph: _Graph, total: Done) -> Iterator[tuple[tuple[Tensor, Tensor, Done], ...]]:
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


def _angles(graph: _Graph, last: Done) -> Iterator[_Found]:
    """Cosines and sines of a position times frequencies, whichever is made last."""
    ours = _waves(graph, last)
    if ours is None:
        return
    for one in graph.done[: graph.place[id(last)]]:
        others = _waves(graph, one)
        if others is None or others.kind == ours.kind or others.of is not ours.of or others.scale != ours.scale:
            continue
        cos, sin = (one, last) if others.kind == "aten::cos" else (last, one)
        parts = tuple(dict.fromkeys((last, one, *ours.parts, *others.parts)))
        # Of which only the dtype is read: one of a former step will do.
        like = last.made.new_empty(0)
        args = (ours.position, ours.frequencies, ours.scale, like)
        yield _Found(_ours.angles_one.default, args, (cos.made, sin.made), parts, (cos, sin))


@dataclass(frozen=True)
class _Waves:
    """Cosines, or sines, of the same angles twice: of a position times frequencies."""

    kind: str
    of: Tensor
    position: Tensor
    frequencies: Tensor
    scale: float
    parts: tuple[Done, ...]


def _waves(graph: _Graph, last: Done) -> _Waves | None:
    cast = last if last.name == "aten::_to_copy" else None
    scaled = graph.maker(last.args[0], "aten::mul") if cast else last if last.name == "aten::mul" else None
    wave = scaled and graph.maker(scaled.args[0], "aten::cos", "aten::sin")
    twice = wave and graph.maker(wave.args[0], "aten::cat")
    if not (scaled and wave and twice) or not isinstance(scaled.args[1], float):
        return None
    if not cast and {reader.name for reader in graph.readers(last.made)} == {"aten::_to_copy"}:
        return None  # its rounding belongs to it
    parts = twice.args[0]
    product = graph.maker(graph.origin(parts[0]), "aten::mul", "aten::bmm")
    if len(parts) != 2 or parts[0] is not parts[1] or product is None or len(tensors_in(product.args)) != 2:
        return None
    for factors in (product.args, product.args[::-1]):
        frequencies, position = (graph.origin(factor) for factor in factors)
        number = graph.maker(position, "aten::_to_copy")
        if number is None or not graph.stays(frequencies) or not _is_list(frequencies, parts[0]):
            continue
        whole = number.args[0].dtype == torch.int64 and number.made.dtype == torch.float32
        if whole and number.args[0].numel() == 1:
            own = (last, scaled, wave, twice, product, number)
            return _Waves(wave.name, wave.args[0], number.args[0], frequencies.view(-1), scaled.args[1], own)
    return None


def _is_list(frequencies: Tensor, angles: Tensor) -> bool:
    return frequencies.dtype == torch.float32 and frequencies.numel() == angles.numel() and frequencies.is_contiguous()
