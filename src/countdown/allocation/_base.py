"""The base of every allocation, and the list of them. This file needs no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from countdown.artifacts import GROUP, Artifact, Artifacts
from countdown.registry import Registry, instances_of


@dataclass(frozen=True)
class Problem:
    """What is to be allocated.

    Args:
        sparsity: Over all sites, each counted by its size.
        sizes: Of each site, by name: the bytes of weights that a token saves where none of its terms are active, so
            that what is spent are bytes whatever methods the sites have.
        artifacts: What calibration left for each site, by name.
    """

    sparsity: float
    sizes: Mapping[str, int]
    artifacts: Mapping[str, Artifacts]


def together(names: Iterable[str], artifacts: Mapping[str, Artifacts]) -> list[list[str]]:
    """Return the sites that must have one sparsity, as they share active sets, in lists; most are alone in theirs.

    Args:
        names: Of sites.
        artifacts: What calibration left for each, by name.
    """
    found: dict[float | str, list[str]] = {}
    for name in names:
        number = artifacts[name].get(GROUP.name)
        found.setdefault(name if number is None else float(number), []).append(name)
    return list(found.values())


class Allocation(ABC):
    """Turns one sparsity into one for each site."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...] | None] = None  # of sites it applies to, None for all
    artifacts: ClassVar[tuple[Artifact, ...]] = ()  # that it needs of each site
    passes: ClassVar[tuple[str, ...]] = ()  # of calibration that make them
    across: ClassVar[bool] = False  # whether it can divide one budget among several entries of a recipe

    @abstractmethod
    def allocate(self, problem: Problem) -> dict[str, float]:
        """Return the sparsity of each site, by name.

        Raises:
            ProfileError: An artifact is missing.
        """


ALLOCATIONS: Registry[Allocation] = Registry("allocation", "countdown.allocation", check=instances_of(Allocation))
register = ALLOCATIONS.register
