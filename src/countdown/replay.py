"""What a CUDA graph is on a GPU, for a CPU: the operations of a step, recorded and then done again in the same memory.

What an operation made when it was recorded is where it puts its result from then on. So a view, which only names part
of a tensor, need not be made again, nor what is the same in every step; and nothing is left of the Python around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from countdown.errors import UnsupportedModelError
from countdown.ops.cpu.library import Ran, library, missing
from countdown.ops.cpu.small import small_calls

_aten = torch.ops.aten
# What is done next may depend on the value that these give Python.
_READING = (_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal)
# These read few entries of what they are given.
_PICKING = (_aten.embedding, _aten.index_select)
# Entries from which on torch uses several threads.
_GRAIN = 32768
_COPYING = (_aten._to_copy, _aten.clone)


def recorded(step: Callable[[], object], *, everything: bool = False) -> Recorded:
    """Return `step` as the operations it does, on the very tensors it works on, after two runs.

    What no step changes is taken to stay as it is: what follows from it is not computed again.

    Args:
        step: What to record.
        everything: Compute that again nevertheless, so that time is taken.

    Raises:
        UnsupportedModelError: What it does depends on the values of tensors, or differs from one run to the next.
    """
    return Recorded(_changing(operations(step), everything))


def operations(step: Callable[[], object]) -> list[Done]:
    """Return the operations of a step, after two runs: those of the second.

    Raises:
        UnsupportedModelError: What it does depends on the values of tensors, or differs from one run to the next.
    """
    first, second = _record(step), _record(step)
    if [done.description for done in first] != [done.description for done in second]:
        raise UnsupportedModelError("the model's step does something else each time: it counts in Python.")
    made = {storage(tensor) for done in first for tensor in done.new}
    if any(made & done.read for done in second):
        raise UnsupportedModelError("the model's step reads what the one before made: it keeps tensors in Python.")
    return second


@dataclass(frozen=True, eq=False)
class Done:
    """An operation that was done, and what it made; on a CPU also what it ran of our library."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Any
    ran: list[Ran]

    @property
    def name(self) -> str:
        """The operation's, such as `aten::mul`."""
        return str(self.op._schema.name)

    @property
    def description(self) -> str:
        """The operation and its arguments, of tensors their shape."""
        return f"{self.op} {tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), (self.args, self.kwargs))}"

    @cached_property
    def read(self) -> set[int]:
        """The storages it was given."""
        return {storage(tensor) for tensor in tensors_in((self.args, self.kwargs))}

    @cached_property
    def written(self) -> set[int]:
        """The storages it was given and changed."""
        names = [argument.name for argument in self.op._schema.arguments]
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        changed = [given.get(argument.name) for argument in self.op._schema.arguments if argument.is_write]
        return {storage(tensor) for tensor in tensors_in(changed)}

    @cached_property
    def new(self) -> list[Tensor]:
        """The tensors it made that are no part of what it was given."""
        return [tensor for tensor in tensors_in(self.made) if storage(tensor) not in self.read]

    @property
    def is_sparse_sum(self) -> bool:
        """Whether it is one, or several; they write nothing but counters."""
        return self.name in ("countdown::sparse", "countdown::given", "countdown::sparse_together")

    @property
    def is_parallel(self) -> bool:
        """Whether torch may do it on several threads."""
        read = () if self.op.overloadpacket in _PICKING else tensors_in((self.args, self.kwargs))
        return any(tensor.numel() >= _GRAIN for tensor in (*read, *tensors_in(self.made)))

    @property
    def calls(self) -> list[Ran]:
        """What it is as calls of our library, none where that does not know it."""
        known = self.read | {storage(tensor) for tensor in self.new}
        # One call of the kernels, on nothing but what was given and made; the last tensor is what that worked in.
        if len(self.ran) == 1 and {storage(tensor) for tensor in self.ran[0].tensors[:-1]} <= known:
            return self.ran
        return [] if missing() else small_calls(self.op._schema.name, self.args, self.kwargs, self.made)

    def again(self) -> Callable[[], object]:
        """Return a call that does it again, in the same memory."""
        if not self.new:
            return partial(self.op, *self.args, **self.kwargs)
        if self.op.overloadpacket in _COPYING:
            return partial(self.new[0].copy_, self.args[0])
        for function in _into(self.op):
            again = partial(function, *self.args, **self.kwargs, out=self.made)
            with suppress(TypeError):
                again()
                return again
        return partial(_copy, self.new, partial(self.op, *self.args, **self.kwargs))


class _Recording(TorchDispatchMode):
    """Keeps what is done within it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Done] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket in _READING:
            raise UnsupportedModelError(f"the model's step reads the value of a tensor in Python ({op.name()}).")
        with _kernels_watched() as ran:
            made = op(*args, **(kwargs or {}))
        self.done.append(Done(op, args, kwargs or {}, made, ran))
        return made


def _record(step: Callable[[], object]) -> list[Done]:
    with _Recording() as recording:
        step()
    done: list[Done] = recording.done
    return done


def _changing(done: Sequence[Done], everything: bool) -> list[Done]:
    """Return what must be done again in the same memory, so no views."""
    changing = changed(done, everything=everything)
    return [one for one in done if one.written or any(storage(tensor) in changing for tensor in one.new)]


def changed(done: Sequence[Done], *, everything: bool = False) -> set[int]:
    """Return the storages that differ from one step to the next, or all that a step makes."""
    changing = set().union(*(one.written for one in done))
    if everything:
        changing.update(storage(tensor) for one in done for tensor in one.new)
    size = -1
    # Until nothing is added: what is written late is read early in the next step.
    while size != len(changing):
        size = len(changing)
        for one in done:
            if changing & one.read:
                changing |= {storage(tensor) for tensor in one.new}
    return changing


def _kernels_watched() -> AbstractContextManager[list[Ran]]:
    return nullcontext([]) if missing() else library().watched()


Calls = list[Ran | Callable[[], object]]


class Recorded:
    """Operations that are done again when it is called.

    Args:
        done: The operations.
    """

    def __init__(self, done: Sequence[Done]) -> None:
        self._done = done
        # Of each operation calls of the library, or one that does it in torch.
        self._calls: list[Calls] = [list(one.calls) or [one.again()] for one in done]
        self._run = _in_rows([call for calls in self._calls for call in calls], apart=self._apart)

    def __call__(self) -> None:
        """Do them again."""
        _run_all(self._run)

    @property
    def _apart(self) -> bool:
        """Whether torch computes nothing of it in parallel."""
        in_torch = (one for one, calls in zip(self._done, self._calls, strict=True) if not isinstance(calls[0], Ran))
        return not any(one.is_parallel for one in in_torch)


def together(steps: Sequence[Recorded], *, sparse_up_to: int) -> Callable[[], None] | None:
    """Return a call that does several steps at once, so that weights are read once; None if they cannot be mixed.

    Steps of one model can, each in memory of its own. Each does what it does alone; see `Ran.with_others` for what is
    not to the same bits.

    Args:
        steps: At most 8.
        sparse_up_to: Of more steps sparse sums are dense: their tokens share too few terms. See `Ran.with_others`.
    """
    names = [[one.name for one in step._done] for step in steps]
    if any(of_step != names[0] for of_step in names[1:]) or _share_memory(steps):
        return None
    calls = _joint_calls(steps, sparse_up_to)
    return partial(_run_all, _in_rows(calls, apart=all(step._apart for step in steps)))


def _joint_calls(steps: Sequence[Recorded], sparse_up_to: int) -> Calls:
    """Return the calls of several steps, operation by operation, those that can be one as one."""
    calls: Calls = []
    joint: list[Ran] = []
    for of_steps in zip(*(step._calls for step in steps), strict=True):
        one = _joint(of_steps, sparse_up_to)
        joint += [one] if one else []
        calls += [one] if one else [call for of_step in of_steps for call in of_step]
    placed = iter(library().in_one_workspace(joint)) if joint else iter(())
    known = {id(one) for one in joint}
    return [next(placed) if id(call) in known else call for call in calls]


def _joint(of_steps: Sequence[Calls], sparse_up_to: int) -> Ran | None:
    """Return one call for those of several steps, if they can be one."""
    calls = [of_step[0] for of_step in of_steps if len(of_step) == 1]
    if len(calls) < len(of_steps) or not all(isinstance(call, Ran) for call in calls):
        return None
    return calls[0].with_others(calls[1:], sparse_up_to=sparse_up_to)  # type: ignore[union-attr, arg-type]


def _share_memory(steps: Sequence[Recorded]) -> bool:
    """Return whether a step writes what another one reads or writes, but for counters of active sets."""
    written = [set().union(*(one.written for one in step._done if not one.is_sparse_sum)) for step in steps]
    made = [{storage(tensor) for one in step._done for tensor in one.new} for step in steps]
    used = [set().union(*(one.read for one in step._done)) | of_step for step, of_step in zip(steps, made, strict=True)]
    return any((written[a] | made[a]) & used[b] for a in range(len(steps)) for b in range(len(steps)) if a != b)


def _in_rows(calls: Calls, *, apart: bool) -> list[Callable[[], object]]:
    """Return what must be called: for what our library does in a row one call of that."""
    found: list[Callable[[], object]] = []
    for ours, row in groupby(calls, key=lambda call: isinstance(call, Ran)):
        if ours:
            found.append(library().again(list(row), apart=apart))  # type: ignore[arg-type]
        else:
            found.extend(row)  # type: ignore[arg-type]
    return found


def _run_all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _copy(to: Sequence[Tensor], call: Callable[[], Any]) -> None:
    for tensor, made in zip(to, tensors_in(call()), strict=True):
        tensor.copy_(made)


def _into(op: Any) -> Iterator[Callable[..., object]]:
    """Yield functions that take the same arguments and put their one result into `out`, the quickest first."""
    wanted = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        other = getattr(op.overloadpacket, name)
        *same, last = [(argument.name, str(argument.type)) for argument in other._schema.arguments]
        if last == ("out", "Tensor") and same == wanted:
            # Called by name in `torch`, most take half as long.
            yield from (f for f in [getattr(torch, op._schema.name.removeprefix("aten::"), None), other] if f)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    """Return which memory a tensor is in."""
    return int(tensor.untyped_storage()._cdata)
