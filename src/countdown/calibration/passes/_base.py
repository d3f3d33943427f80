"""The base of every pass, what it works on, and the list of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from countdown.artifacts import MULTIPLIERS
from countdown.errors import CountdownError, UnsupportedModelError
from countdown.finite import not_finite
from countdown.methods import Method
from countdown.modules import Observer, observed
from countdown.profiles.profile import Entry
from countdown.profiles.recipe import Recipe
from countdown.registry import Registry, instances_of
from countdown.sites import Site
from countdown.sites.decoder import decoder_of
from countdown.sums import Sum
from countdown.weights import Weight


@dataclass
class Assignment:
    """A site, the method that is calibrated for it, and what is known of it so far.

    Args:
        site: The site.
        method: Its method; its sparsity is the target.
        artifacts: What passes found, by name.
        parts: The selector's weights, once its artifacts are there.
    """

    site: Site
    method: Method
    artifacts: dict[str, Tensor] = field(default_factory=dict)
    parts: Sequence[Weight] = ()

    def indicator(self, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the weighted indicator, float32 `[..., terms]`, for the site's input and factors."""
        value = self.method.selector.score(sum_, x, self.parts, factors)
        multipliers = self.artifacts.get(MULTIPLIERS.name)
        return value if multipliers is None else value * multipliers.to(value.device)


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
    """

    model: nn.Module
    sequences: list[Tensor]
    shuffled: list[Tensor]
    recipe: Recipe
    assigned: list[Assignment]
    owners: Mapping[str, int]
    progress: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Weights of each site, by name."""
        return {one.site.name: one.site.size for one in self.assigned}

    @property
    def entries(self) -> list[Entry]:
        """The recipe's entries with what is known of their sites."""
        found = {one.site.name: one.artifacts for one in self.assigned}
        return [
            Entry(entry.pattern, entry.method, {n: found[n] for n, owner in self.owners.items() if owner == place})
            for place, entry in enumerate(self.recipe.entries)
        ]

    def wanting(self, name: str) -> list[Assignment]:
        """Return the assignments whose method names a pass."""
        return [one for one in self.assigned if name in one.method.passes()]


class Pass(ABC):
    """Reads the text, or some of it, and adds artifacts to the sites whose methods name it.

    Sums and counts are kept, no activations.
    """

    name: ClassVar[str]
    rank: ClassVar[int]  # passes run in ascending order

    @abstractmethod
    def run(self, run: Run) -> None:
        """Add artifacts to `run.wanting(self.name)`."""


PASSES: Registry[Pass] = Registry("pass", "countdown.calibration.passes", check=instances_of(Pass))
register = PASSES.register


@contextmanager
def decoding(model: nn.Module, sites: Sequence[Site], observe: Observer) -> Iterator[Callable[[Tensor], None]]:
    """Within the context, the function given runs the decoder on token ids `[length]`, and `observe` sees the sites.

    The head is left out: the vocabulary's logits cost more than a layer.
    """
    decoder, _ = decoder_of(model)
    device = next(model.parameters()).device

    def feed(sequence: Tensor) -> None:
        try:
            decoder(input_ids=sequence[None].to(device), use_cache=False)
        except (TypeError, ValueError, AttributeError) as error:  # what models raise for an input that they miss
            if isinstance(error, CountdownError):
                raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UnsupportedModelError(f"{type(model).__name__} does not run on text alone: {said}") from error

    with torch.inference_mode(), observed(model, sites, observe):
        yield feed


def check_finite(model: nn.Module, site: Site, factors: tuple[Tensor, ...]) -> None:
    """Raise CountdownError unless every factor is finite."""
    # A sum is finite only if every term is; one read-back for each site and sequence.
    if not bool(torch.stack([factor.float().sum() for factor in factors]).sum().isfinite()):
        raise not_finite(f"activations of {site.name} are", model)


def never_ran(name: str) -> UnsupportedModelError:
    """Return what is raised for a site that saw no token."""
    return UnsupportedModelError(f"{name} computed nothing for the text, so it cannot be calibrated; leave it out.")
