"""Differential evolution (Storn and Price, 1997; rand/1/bin), as R-Sparse's search for α uses it (arXiv 2504.19449)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from countdown.errors import ConfigError

# How far a difference moves a candidate, and the share of its entries that move.
MUTATION = CROSSOVER = 0.5
# A candidate that is drawn is 1 in this share of its entries: α = 1 is no low-rank term. Elsewhere it is down to this.
ONES, LOWEST = 0.75, 0.7
# Entries have so many decimals, so that a recipe says exactly what was tried.
DECIMALS = 3
# A new candidate is made from three others.
LEAST_POPULATION = 4


@dataclass(frozen=True)
class SearchSettings:
    """How much is tried.

    Args:
        population: Candidates at a time; at least 4, of which three make a new one.
        generations: How often the population is tried; the first time as it is drawn. At least 1.
        groups: Into how many groups of neighbours the layers are put; linears of one kind in a group share α.
        seed: Of the random numbers.

    Raises:
        ConfigError: A number is out of range.
    """

    population: int = 32
    generations: int = 5
    groups: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("population", LEAST_POPULATION), ("generations", 1), ("groups", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} of the search is {value!r}, expected a whole number of {least} or more.")

    @property
    def evaluations(self) -> int:
        """How many candidates are tried."""
        return self.population * self.generations


def evolve(judge: Callable[[Sequence[float]], float], entries: int, settings: SearchSettings) -> list[float]:
    """Return the candidate for which `judge` is smallest, by differential evolution (rand/1/bin).

    Args:
        judge: From a candidate, `entries` numbers from 0 to 1, to what is minimised.
        entries: At least 1.
        settings: How many candidates, how often, and the seed. The first candidate is all ones.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    population = [_drawn(entries, generator) for _ in range(settings.population)]
    population[0] = torch.ones(entries, dtype=torch.float64, device="cpu")
    values = [judge(_numbers(candidate)) for candidate in population]
    for _ in range(1, settings.generations):
        # All of a generation are made from the one before, whichever of its own turn out better.
        trials = [_mutated(population, place, generator) for place in range(settings.population)]
        for place, candidate in enumerate(trials):
            value = judge(_numbers(candidate))
            if value <= values[place]:
                population[place], values[place] = candidate, value
    return _numbers(population[values.index(min(values))])


def _drawn(entries: int, generator: torch.Generator) -> Tensor:
    """Return a random candidate, float64 `[entries]`."""
    left_out, depth = torch.rand(2, entries, generator=generator, dtype=torch.float64, device="cpu")
    return torch.where(left_out < ONES, 1.0, 1 - (1 - LOWEST) * depth).round(decimals=DECIMALS)


def _mutated(population: Sequence[Tensor], place: int, generator: torch.Generator) -> Tensor:
    """Return a candidate with some entries moved to where three others point, float64 `[entries]`."""
    order = torch.randperm(len(population), generator=generator, dtype=torch.int64, device="cpu").tolist()
    base, plus, minus = (population[other] for other in [one for one in order if one != place][:3])
    entries = len(base)
    crossed = torch.rand(entries, generator=generator, dtype=torch.float64, device="cpu") < CROSSOVER
    crossed[int(torch.randint(entries, (), generator=generator, dtype=torch.int64, device="cpu"))] = True
    moved = (base + MUTATION * (plus - minus)).clamp(0, 1).round(decimals=DECIMALS)
    return torch.where(crossed, moved, population[place])


def _numbers(candidate: Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in candidate.tolist()]
