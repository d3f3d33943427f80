"""Several steps of one model, put together, at once: what reads weights is done for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from countdown.fusing.fused import Fused, Operation, Slot
from countdown.ops import backends, reference
from countdown.ops.call import Call
from countdown.ops.together import calls_of
from countdown.replay import tensors_in

# Operations on rows, one for each token, and how many of their first arguments are such.
_IN_ROWS = {
    "countdown::project": 1, "countdown::gated": 1, "countdown::normalise": 1, "countdown::add_and_normalise": 2,
    "countdown::sparse": 1, "countdown::sparse_together": 1,
}  # fmt: skip


def together(steps: Sequence[Fused], *, sparse_up_to: int) -> Together | None:
    """Return several steps at once; None if they cannot be mixed.

    Steps of one model can, each in memory of its own. Sums of several tokens are added in another order than those of
    one.

    Args:
        steps: At most 8.
        sparse_up_to: Of more steps sparse sums are dense, and counted so: their tokens share too few terms.
    """
    names = [[one.name for one in step.operations] for step in steps]
    if any(of_step != names[0] for of_step in names[1:]) or _share_memory(steps):
        return None
    return Together(steps, dense=len(steps) > sparse_up_to)


def _share_memory(steps: Sequence[Fused]) -> bool:
    """Return whether a step writes what another one reads or writes."""
    return any(one.written & (other.read | other.written) for one in steps for other in steps if one is not other)


class Together:
    """Steps that are done at once, when it is called; it returns the results of each.

    Args:
        steps: Alike, operation by operation.
        dense: Sparse sums are.
    """

    def __init__(self, steps: Sequence[Fused], *, dense: bool) -> None:
        self._steps, self._dense = steps, dense
        self._alike = [(ones, _rows_of(ones)) for ones in zip(*(step.operations for step in steps), strict=True)]

    def __call__(self) -> list[list[Tensor]]:
        now: list[dict[Slot, Tensor]] = [{} for _ in self._steps]
        counted = _Counted()
        for ones, rows in self._alike:
            if rows:
                self._do_in_rows(ones, now, rows, counted)
                continue
            for one, of_step in zip(ones, now, strict=True):
                one.do(of_step)
        counted.count()
        return [step.results(of_step) for step, of_step in zip(self._steps, now, strict=True)]

    def _do_in_rows(
        self, ones: Sequence[Operation], now: Sequence[dict[Slot, Tensor]], rows: int, counted: _Counted
    ) -> None:
        first = ones[0]
        places = [[of_step[one.args[place]] for one, of_step in zip(ones, now, strict=True)] for place in range(rows)]
        args = (*map(_stacked, places), *first.args[rows:])
        dense = self._dense and first.name in _CALLS
        made = _dense(first, args, counted) if dense else first.op(*args, **first.kwargs)
        for place, (one, of_step) in enumerate(zip(ones, now, strict=True)):
            one.keep([tensor[place : place + 1] for tensor in tensors_in(made)], of_step)


class _Counted:
    """What is to be counted of sums that are dense: by how much, and where."""

    def __init__(self) -> None:
        self._counters: dict[int, list[Tensor]] = {}

    def add(self, call: Call) -> None:
        """Add a call of which every term of every token is active."""
        assert call.counters is not None
        tokens, *looks = call.counters
        self._counters.setdefault(call.tokens, []).append(tokens)
        self._counters.setdefault(call.tokens * call.terms, []).extend(looks)

    def count(self) -> None:
        """Count all, few operations."""
        for number, counters in self._counters.items():
            torch._foreach_add_(counters, number)


def _rows_of(ones: Sequence[Operation]) -> int:
    """Return how many first arguments of alike operations can be rows of one; 0 if it must be done for each."""
    if (rows := _IN_ROWS.get(ones[0].name)) is None:
        return 0
    made = all(where is not None and where[1][0] == 1 for one in ones for where in one.makes)
    given = all(isinstance(argument, Slot) for one in ones for argument in one.args[:rows])
    others = [_constants(one, rows) for one in ones]
    return rows if made and given and all(of_one == others[0] for of_one in others[1:]) else 0


def _constants(one: Operation, rows: int) -> list[Any]:
    """Return what tells its other arguments apart, of tensors where they are."""
    leaves, form = tree_flatten((one.args[rows:], one.kwargs))

    def told(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype
        # What only one step makes is no constant.
        return object() if isinstance(leaf, Slot) else leaf

    return [form, *map(told, leaves)]


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Return tensors `[1, ...]` as one `[n, ...]`: where they lie evenly in one memory without copying them."""
    first, places = rows[0], [row.storage_offset() for row in rows]
    step = places[1] - places[0]
    even = all(place == places[0] + number * step for number, place in enumerate(places))
    same = all(row.untyped_storage()._cdata == first.untyped_storage()._cdata for row in rows)
    if same and even and step > 0 and all(row.stride() == first.stride() for row in rows):
        return first.as_strided((len(rows), *first.shape[1:]), (step, *first.stride()[1:]))
    return torch.cat(list(rows))


def _dense(one: Operation, args: Sequence[Any], counted: _Counted) -> Tensor:
    """Return sparse sums with every term active; what the reference computes stays as it is."""
    calls = _CALLS[one.name](*args, **one.kwargs)
    if any(backends.is_for_reference(call) for call in calls):
        y: Tensor = one.op(*args, **one.kwargs)
        return y
    for call in calls:
        counted.add(call)
    return torch.cat([reference.dense(call) for call in calls], dim=-1)


_CALLS: dict[str, Callable[..., list[Call]]] = {
    "countdown::sparse": lambda *args, **form: [Call.of("sparse", *args, **form)],
    "countdown::sparse_together": calls_of,
}
