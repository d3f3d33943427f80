"""Several decode loops that advance together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from countdown.decoding import DecodeLoop, on_device
from countdown.ops.base import MOST_TOKENS
from countdown.replay import Recorded, together

# Groups of loops that are kept joined.
MOST_JOINED = 16


class Joint:
    """Steps of several loops of one model at once, so that weights are read once for all; on a CPU.

    What was joined is kept, so that the same loops are quickly joined again.

    Args:
        sparse_up_to: In steps of more loops sparse sums are dense.
    """

    def __init__(self, *, sparse_up_to: int = MOST_TOKENS) -> None:
        self._sparse_up_to = sparse_up_to
        self._known: dict[tuple[int, ...], tuple[list[Recorded], Callable[[], None] | None]] = {}

    @torch.no_grad()
    def advance(self, loops: Sequence[DecodeLoop]) -> None:
        """Advance each loop by a step, as `DecodeLoop.advance` does; its logits are `current` then.

        Raises:
            ConfigError: More steps than one of them has left.
        """
        for loop in loops:
            loop._check_left(1)
        # Before any step is counted, as making it may fail. Where steps cannot be mixed, each loop goes on alone.
        run = self._joined([loop._replay for loop in loops if not loop._first])
        steps = [loop._replay for loop in loops if loop._begins_step()]
        with on_device(loops[0].token.device):
            for step in [run] if run else steps:
                step()

    def _joined(self, steps: Sequence[Callable[[], object]]) -> Callable[[], None] | None:
        recordings = [step for step in steps if isinstance(step, Recorded)]
        if len(recordings) < max(2, len(steps)):
            return None
        key = tuple(map(id, recordings))
        if (known := self._known.pop(key, None)) is None:
            if len(self._known) == MOST_JOINED:
                self._known.pop(next(iter(self._known)))  # the one that was used longest ago
            # Kept alive, so that no other gets the same id.
            known = (recordings, together(recordings, sparse_up_to=self._sparse_up_to))
        self._known[key] = known
        return known[1]

    def forget(self, loops: Sequence[DecodeLoop]) -> None:
        """Let go of what is joined with others than these loops."""
        kept = {id(loop._replay) for loop in loops}
        self._known = {key: known for key, known in self._known.items() if kept.issuperset(key)}
