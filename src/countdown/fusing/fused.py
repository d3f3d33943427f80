"""A recorded step, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from countdown.fusing.angles import angles
from countdown.fusing.attention import attention
from countdown.fusing.gates import gated
from countdown.fusing.graph import Graph, put_together
from countdown.fusing.norms import norms
from countdown.ops import backends  # noqa: F401  (registers the ops)
from countdown.replay import Done, changed, operations, storage, tensors_in


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
    for find in (gated, attention, norms, angles):
        done = put_together(find, done, wanted)
    return Fused(_apart_from_linears(_needed(done, wanted), wanted), wanted)


@dataclass(frozen=True)
class Slot:
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
    makes: list[tuple[Slot, torch.Size] | None]
    computes: bool
    drops: list[Slot] = field(default_factory=list)

    def do(self, now: dict[Slot, Tensor]) -> None:
        """Do it again, on what there is by slot."""
        args, kwargs = tree_map_only(Slot, now.__getitem__, (self.args, self.kwargs))
        self.keep(tensors_in(self.op(*args, **kwargs)), now)

    def keep(self, made: Sequence[Tensor], now: dict[Slot, Tensor]) -> None:
        """Put what it made into slots, and empty those that nobody reads any more."""
        for where, tensor in zip(self.makes, made, strict=True):
            if where is not None:
                now[where[0]] = tensor.view(where[1])
        for slot in self.drops:
            del now[slot]


class Fused:
    """Operations that are done again, with what is there now, when it is called; it returns the results.

    Args:
        done: As they were recorded and put together.
        results: Tensors that they made.
    """

    def __init__(self, done: Sequence[Done], results: Sequence[Tensor]) -> None:
        slots: dict[int, Slot] = {}
        made = {storage(tensor) for one in done for tensor in one.new}
        # Of what is there before a step: the memory that it reads, and that it writes, but for counters of active sets.
        self.read = set().union(*(one.read for one in done)) - made
        self.written = set().union(*(one.written for one in done if not one.is_sparse_sum)) - made

        def named(tensor: Tensor) -> Tensor | Slot:
            return slots.get(id(tensor), tensor)

        self.operations = []
        for one in done:
            args, kwargs = tree_map_only(Tensor, named, (one.args, one.kwargs))
            given = {id(tensor) for tensor in tensors_in((one.args, one.kwargs))}
            makes: list[tuple[Slot, torch.Size] | None] = []
            for tensor in tensors_in(one.made):
                if id(tensor) in given:
                    makes.append(None)
                    continue
                slots[id(tensor)] = Slot(len(slots))
                makes.append((slots[id(tensor)], tensor.shape))
            self.operations.append(
                Operation(one.name, one.op, args, kwargs, makes, computes=bool(one.new or one.written))
            )
        self._results = [named(tensor) for tensor in results]
        self._drop_early()

    def _drop_early(self) -> None:
        later = {slot for slot in self._results if isinstance(slot, Slot)}
        for one in reversed(self.operations):
            used = {leaf for leaf in tree_leaves((one.args, one.kwargs)) if isinstance(leaf, Slot)}
            used |= {where[0] for where in one.makes if where}
            one.drops = sorted(used - later, key=lambda slot: slot.number)
            later |= used

    def __call__(self) -> list[Tensor]:
        now: dict[Slot, Tensor] = {}
        for one in self.operations:
            one.do(now)
        return self.results(now)

    def results(self, now: dict[Slot, Tensor]) -> list[Tensor]:
        """Return the results, of what was made."""
        return [now[one] if isinstance(one, Slot) else one for one in self._results]


def _apart_from_linears(done: Sequence[Done], results: Sequence[Tensor]) -> list[Done]:
    """Return the operations, those without `overlap` that sparse linears read."""
    graph = Graph(done, results)
    ours = torch.ops.countdown
    small = (ours.normalise.default, ours.add_and_normalise.default, ours.attend_next.default)

    def apart(one: Done) -> Done:
        readers = {reader for tensor in tensors_in(one.made) for reader in graph.readers(tensor)}
        if one.op not in small or not any(_is_sparse_linear(reader) for reader in readers):
            return one
        return replace(one, args=(*one.args, False))

    return [apart(one) for one in done]


def _is_sparse_linear(one: Done) -> bool:
    return one.name == "countdown::sparse_together" or (one.is_sparse_sum and one.kwargs["kind"] == "linear")


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
