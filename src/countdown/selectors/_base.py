"""The base of every selector, and the list of them. This file needs no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from countdown.artifacts import Artifacts, Moment
from countdown.parts import Keeper
from countdown.registry import Registry, instances_of

if TYPE_CHECKING:
    from torch import Tensor

    from countdown.sums import Sum
    from countdown.weights import Weight

    Shape = tuple[int | None, int | None]


class Selector(Keeper):
    """Scores every term for each token; the small scores are dropped.

    It may keep parts, made from a site's weights and artifacts. Ops receive it by name, with its parts, so that a
    backend can recognise the ones it has a kernel for and leave the rest to the reference, which calls `score`.

    A subclass is a frozen dataclass, of which equal ones are the same selector.
    """

    name: str  # under which ops receive it
    indicator: str  # in results: `exact`, `proxy`, `low-rank` or `given`
    from_prompt: bool = False  # whether it chooses one set for all generated tokens of a sequence, from its prompt
    reads: tuple[str, ...]  # roles of the weights that are read for all terms; of the others, active terms alone
    moments: tuple[Moment, ...] = ()  # what `prepare` needs of calibration; it returns `artifacts`

    @abstractmethod
    def score(self, sum_: Sum, x: Tensor, parts: Sequence[Weight], factors: Sequence[Tensor]) -> Tensor:
        """Return the indicator, float32 `[..., terms]`, 0 or more; the truth that kernels are tested against.

        Args:
            sum_: What is summed.
            x: Its input `[..., d]`.
            parts: The selector's own weights.
            factors: Those of the sum, each `[..., terms]`.
        """

    def prepare(self, moments: Mapping[Moment, Tensor]) -> Artifacts:
        """Return the selector's artifacts for a site from its moments."""
        return {}

    def make(self, sum_: Sum, artifacts: Artifacts) -> tuple[Weight, ...]:
        """See `Keeper.make`; most have none."""
        return ()

    def accepts(self, formats: Sequence[str]) -> bool:
        """Return whether parts in these formats, one for each, are its own."""
        return not formats

    def shapes(self, d: int, terms: int) -> tuple[Shape, ...]:
        return ()

    def part_bytes(self, sum_: Sum) -> int:
        return 0

    def bytes_read(self, sum_: Sum, active: Sequence[float]) -> float:
        """Return the bytes of weights that a token reads, its own included.

        Args:
            sum_: What is summed.
            active: The share of the terms that is left after each look at them. The columns that are summed are read of
                what is left at last, of other weights what is left at first.
        """
        *others, columns = zip(sum_.roles, sum_.weights, strict=True)
        own = self.part_bytes(sum_) + columns[1].nbytes * active[-1]
        return own + sum(weight.nbytes * (1.0 if role in self.reads else active[0]) for role, weight in others)


SELECTORS: Registry[Selector] = Registry("selector", "countdown.selectors", check=instances_of(Selector))
register = SELECTORS.register
