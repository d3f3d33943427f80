"""Who makes and who reads the tensors of a step, and which of its operations can be one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from countdown.replay import Done, storage, tensors_in


@dataclass(frozen=True)
class Found:
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


class Graph:
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

    def fits(self, found: Found) -> bool:
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


def put_together(
    find: Callable[[Graph, Done], Iterator[Found]], done: Sequence[Done], results: Sequence[Tensor]
) -> list[Done]:
    """Return the operations with those that `find` knows by their last one, the best first, as one each."""
    graph = Graph(done, results)
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
