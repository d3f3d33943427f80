"""The base of every pass, what it works on, and the list of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from countdown.artifacts import MULTIPLIERS, NORMS
from countdown.compensation import Compensation
from countdown.cost import saved_bytes
from countdown.errors import CountdownError, UnsupportedModelError, told
from countdown.finite import not_finite
from countdown.memory import batches
from countdown.methods import Method
from countdown.modules import Adder, Observer, observed
from countdown.ops.reference import size_of
from countdown.profiles.profile import Entry, allocated
from countdown.profiles.recipe import Recipe
from countdown.progress import track
from countdown.registry import Registry, instances_of
from countdown.sites import Site
from countdown.sites.decoder import decoder_of
from countdown.sums import Sum
from countdown.weights import Weight

T = TypeVar("T")


@dataclass
class Assignment:
    """A site, the method that is calibrated for it, and what is known of it so far.

    Args:
        site: The site.
        method: Its method; its sparsity is the target.
        artifacts: What passes found, by name.
        parts: The selector's weights, once its artifacts are there.
        added: The compensation's, those of sparsity 0, of which others are a part; of one that is derived.
    """

    site: Site
    method: Method
    artifacts: dict[str, Tensor] = field(default_factory=dict)
    parts: Sequence[Weight] = ()
    added: Sequence[Weight] = ()
    _made: dict[object, Sequence[Weight]] = field(default_factory=dict, init=False)

    def make_parts(self) -> None:
        """Make the weights of the selector and of the compensation."""
        sum_ = self.site.sum
        self.parts = self.method.selector.make(sum_, self.artifacts)
        widest = self.method.at(self.site.name, 0.0).compensation
        if widest is not None and widest.derived:
            self.added = widest.make(sum_, self.artifacts)

    def added_at(self, sparsity: float, x: Tensor, dropped: Tensor) -> Tensor | None:
        """Return what the compensation adds at a sparsity, `[..., outputs]`, if it adds anything; see
        `Compensation.added`.
        """
        compensation = self.method.at(self.site.name, sparsity).with_artifacts(self.artifacts).compensation
        # What passes find is not there before they have run.
        if compensation is None or not all(one.name in self.artifacts for one in compensation.artifacts):
            return None
        sparse = torch.ones((*x.shape[:-1], 1), dtype=torch.bool, device=x.device)
        return compensation.added(x, dropped, sparse, self._added_by(compensation))

    def _added_by(self, compensation: Compensation) -> Sequence[Weight]:
        if compensation.derived:
            return compensation.cut(self.site.sum, self.added)
        key = compensation.taken(self.artifacts)
        if key not in self._made:
            self._made[key] = compensation.make(self.site.sum, self.artifacts)
        return self._made[key]

    def indicator(self, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the weighted indicator, float32 `[..., terms]`, for the site's input and factors."""
        value = self.method.selector.score(sum_, x, self.parts, factors)
        multipliers = self.artifacts.get(MULTIPLIERS.name)
        return value if multipliers is None else value * multipliers.to(value.device)

    def second_indicator(self, factors: tuple[Tensor, ...]) -> Tensor | None:
        """Return what a second look compares, likewise; None where there is one look."""
        if len(self.method.drops) == 1:
            return None
        norms = self.artifacts.get(NORMS.name)
        return size_of(factors) if norms is None else size_of(factors) * norms.to(factors[0].device)


@dataclass
class Run:
    """One calibration.

    Args:
        model: A dense causal language model in eval mode.
        sequences: Token ids, each int64 `[length]`.
        shuffled: The same in an order of which a stride takes some of each text.
        recipe: What is calibrated.
        assigned: Its sites; what passes find is put here.
        owners: The recipe's entry that each site belongs to, by name.
        progress: Show progress on stderr.
        readings: How often the text is read, in whole or in part, by all passes together.
        begun: How many of these have begun.
    """

    model: nn.Module
    sequences: list[Tensor]
    shuffled: list[Tensor]
    recipe: Recipe
    assigned: list[Assignment]
    owners: Mapping[str, int]
    progress: bool
    readings: int = 0
    begun: int = 0

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Yield what is read of the text, showing which reading of how many it is, and how long the rest of it takes.

        Readings differ too much for the time of all to be told from one.
        """
        self.begun += 1
        label = f"calibrating ({self.begun} of {self.readings}), {description}"
        return track(items, label, show=self.progress)

    def batches(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Return sequences as the decoder reads them, each batch int64 `[sequences, length]`; see `memory.batches`."""
        terms = max(one.site.terms for one in self.assigned)
        return batches(sequences, next(self.model.parameters()).device, terms=terms)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What sparsity saves of each site, by name; see `Problem`."""
        return {one.site.name: saved_bytes(one.site, one.method) for one in self.assigned}

    @property
    def entries(self) -> list[Entry]:
        """The recipe's entries with what is known of their sites."""
        found = {one.site.name: one.artifacts for one in self.assigned}
        return [
            Entry(entry.pattern, entry.method, {n: found[n] for n, owner in self.owners.items() if owner == place})
            for place, entry in enumerate(self.recipe.entries)
        ]

    def allocated(self, sparsity: float | None = None) -> dict[str, float]:
        """Return the sparsity of each site where every entry has this one, or its own; see `profile.allocated`."""
        entries = self.entries
        if sparsity is not None:
            entries = [replace(entry, method=replace(entry.method, sparsity=sparsity)) for entry in entries]
        return allocated(entries, self.sizes, self.recipe.allocation)

    def wanting(self, name: str) -> list[Assignment]:
        """Return the assignments whose method names a pass."""
        return [one for one in self.assigned if name in one.method.passes()]


class Pass(ABC):
    """Reads the text, or some of it, and adds artifacts to the sites whose methods name it.

    Sums and counts are kept, no activations.
    """

    name: ClassVar[str]
    rank: ClassVar[int]  # passes run in ascending order

    def check(self, run: Run) -> None:  # noqa: B027  (most passes have nothing to say)
        """Raise what is known to be wrong before anything is read."""

    @abstractmethod
    def run(self, run: Run) -> None:
        """Add artifacts to `run.wanting(self.name)`."""

    def readings(self, run: Run) -> int:
        """Return how often `run` will read the text by `Run.track`; 1 unless a pass says otherwise."""
        return 1


PASSES: Registry[Pass] = Registry("pass", "countdown.calibration.passes", check=instances_of(Pass))
register = PASSES.register


@contextmanager
def decoding(
    model: nn.Module, sites: Sequence[Site], observe: Observer, add: Adder = lambda *_: None
) -> Iterator[Callable[[Tensor], None]]:
    """Within the context, the function given runs the decoder on token ids `[sequences, length]`, and `observe` sees
    the sites, `add` those where it drops terms. It raises CountdownError if activations were not finite.

    The head is left out: the vocabulary's logits cost more than a layer.
    """
    decoder, _ = decoder_of(model)
    device = next(model.parameters()).device
    finite = _Finite(model, device)

    def checked(site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor | None:
        finite.add(site, factors)
        return observe(site, sum_, x, factors)

    def feed(batch: Tensor) -> None:
        try:
            decoder(input_ids=batch.to(device), use_cache=False)
        except (TypeError, ValueError, AttributeError) as error:  # what models raise for an input that they miss
            if isinstance(error, CountdownError):
                raise
            raise UnsupportedModelError(f"{type(model).__name__} does not run on text alone: {told(error)}") from error
        finite.check()

    with torch.inference_mode(), observed(model, sites, checked, add):
        yield feed


class _Finite:
    """Whether the factors of every site are finite, read back once a batch: each time, a GPU would wait."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._sums: dict[str, Tensor] = {}

    def add(self, site: Site, factors: tuple[Tensor, ...]) -> None:
        # A sum is finite only if every term is.
        total = torch.stack([factor.sum(dtype=torch.float32) for factor in factors]).sum().to(self._device)
        self._sums[site.name] = total + self._sums.get(site.name, 0)

    def check(self) -> None:
        """Raise CountdownError for the first site of the batch that is not."""
        if not self._sums:
            return
        found = torch.stack(list(self._sums.values())).isfinite().tolist()
        for name, finite in zip(self._sums, found, strict=True):
            if not finite:
                raise not_finite(f"activations of {name} are", self._model)
        self._sums.clear()


def never_ran(name: str) -> UnsupportedModelError:
    """Return what is raised for a site that saw no token."""
    return UnsupportedModelError(f"{name} computed nothing for the text, so it cannot be calibrated; leave it out.")
