"""The decode loop as a GPU has it, without its graph: what can be tried on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from countdown.decoding import DecodeLoop
from countdown.fusing.fused import fused
from countdown.one_token import one_token


class FusedLoop(DecodeLoop):
    """Operations are put together, and done again one by one."""

    def _trace(self) -> Callable[[], object]:
        with one_token(self.model, self.linears):
            step = self.traced = fused(self._step, lambda: [self._logits])
        # Where they are each time, as in a graph.
        self._logits = self._logits.clone()

        def again() -> None:
            (logits,) = step()
            self._logits.copy_(logits)

        return again

    @property
    def operations(self) -> Counter[str]:
        """How often a step does what, views left out."""
        names = (one.name.split("::")[1] for one in self.traced.operations if one.computes)
        return Counter(names)
