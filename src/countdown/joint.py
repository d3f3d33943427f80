"""Several decode loops that advance together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from countdown.decoding import DecodeLoop, captured, on_device
from countdown.fusing import together as fused_together
from countdown.fusing.fused import Fused
from countdown.ops.base import MOST_TOKENS
from countdown.replay import Recorded, together

# Groups of loops that are kept joined.
MOST_JOINED = 16
# Steps that the same loops do side by side before a graph is made for them, which takes as long as many of these.
ALONE = 8
# Does a step of several loops; returns the logits of each, None where they are where the loop's own step puts them.
Run = Callable[[], list[Tensor] | None]


class Joint:
    """Steps of several loops of one model at once, so that weights are read once for all.

    What was joined is kept, so that the same loops are quickly joined again.

    Args:
        sparse_up_to: In steps of more loops sparse sums are dense.
    """

    def __init__(self, *, sparse_up_to: int = MOST_TOKENS) -> None:
        self._sparse_up_to = sparse_up_to
        self._known: dict[tuple[int, ...], _Group] = {}

    @torch.no_grad()
    def advance(self, loops: Sequence[DecodeLoop]) -> None:
        """Advance each loop by a step, as `DecodeLoop.advance` does; its logits are `current` then.

        Raises:
            ConfigError: More steps than one of them has left.
        """
        for loop in loops:
            loop._check_left(1)
        # Before any step is counted, as making it may fail. Where steps cannot be mixed, each loop goes on alone.
        running = [loop for loop in loops if not loop._first]
        with on_device(loops[0].token.device):
            run = self._joined(running)
            for loop in loops:
                if loop._begins_step() and run is None:
                    loop._replay()
            if run is not None:
                for loop, logits in zip(running, run() or (), strict=False):
                    loop.current = logits

    def _joined(self, loops: Sequence[DecodeLoop]) -> Run | None:
        if len(loops) < 2:
            return None
        key = tuple(id(loop._replay) for loop in loops)
        group = self._known.pop(key, None)
        if group is None:
            if len(self._known) == MOST_JOINED:
                self._known.pop(next(iter(self._known)))  # the one that was used longest ago
            group = _Group(loops, self._sparse_up_to)
        self._known[key] = group
        return group.step()

    def forget(self, loops: Sequence[DecodeLoop]) -> None:
        """Let go of what is joined with others than these loops."""
        kept = {id(loop._replay) for loop in loops}
        self._known = {key: known for key, known in self._known.items() if kept.issuperset(key)}


class _Group:
    """Loops that do steps together.

    Args:
        loops: Of one model.
        sparse_up_to: See `Joint`.
    """

    def __init__(self, loops: Sequence[DecodeLoop], sparse_up_to: int) -> None:
        self._sparse_up_to, self._loops = sparse_up_to, list(loops)
        # Kept alive, so that no other gets the same id.
        self._steps = [loop._replay for loop in loops]
        self._waits = ALONE if loops[0].token.is_cuda else 0
        self._run: Run | None = None
        self._is_made = False

    def step(self) -> Run | None:
        """Return what does the next step; None if each loop is to do its own."""
        if self._waits:
            self._waits -= 1
            return None
        if not self._is_made:
            self._run, self._is_made = self._made(), True
        return self._run

    def _made(self) -> Run | None:
        recorded = [loop.traced for loop in self._loops if isinstance(loop.traced, Recorded)]
        if len(recorded) == len(self._loops):
            return together(recorded, sparse_up_to=self._sparse_up_to)
        fused = [loop.traced for loop in self._loops if isinstance(loop.traced, Fused)]
        if len(fused) < len(self._loops):
            return None
        steps = fused_together.together(fused, sparse_up_to=self._sparse_up_to)
        return None if steps is None else self._captured(lambda: [logits for (logits,) in steps()])

    def _captured(self, run: Callable[[], list[Tensor]]) -> Run:
        """Return a step as a graph, on a GPU; the loops stay where they are."""
        if not self._loops[0].token.is_cuda:
            return run
        logits: list[Tensor] = []
        with ExitStack() as stack:
            for loop in self._loops:
                stack.enter_context(loop._warming_up())
            replay = captured(lambda: logits.__setitem__(slice(None), run()))

        def again() -> list[Tensor]:
            replay()
            return logits

        return again
