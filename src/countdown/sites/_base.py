"""The base of every site, and the list of their kinds.

What calibrates, stores, masks and counts knows a site by what is declared here, and asks for no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from countdown.errors import UnsupportedModelError
from countdown.registry import Registry, instances_of
from countdown.sites.holders import Rows, holder_of
from countdown.sums import SUMS, Sum
from countdown.weights import Weight

Shape = Mapping[str, int | str]


@dataclass(frozen=True)
class Site(ABC):
    """A module that sums terms, and where it is.

    Args:
        name: The module's dotted name in the model.
        module: The module itself.
    """

    sum_class: ClassVar[type[Sum]]

    name: str
    module: nn.Module

    @abstractmethod
    def rows(self) -> tuple[Rows, ...]:
        """Return where in the module each of the sum's weights is."""

    @property
    @abstractmethod
    def shape(self) -> dict[str, int | str]:
        """What identifies the site's form, as JSON can hold it; its `kind` among it."""

    @staticmethod
    @abstractmethod
    def axes(shape: Shape) -> dict[str, int]:
        """Return how many `terms` and `inputs` a site of this form has, of an FFN `outputs`: the axes of artifacts."""

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.sum_class.kind

    @property
    def sum(self) -> Sum:
        """What it sums, with its weights as they are now."""
        weights, biases = zip(*(rows.of(self.module) for rows in self.rows()), strict=True)
        return self.sum_class(weights, biases, getattr(self, "activation", ""))

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Its matrices, also where an adapter is around one: to look at, not to compute with."""
        return tuple(rows.of(self.module, foreign=True)[0] for rows in self.rows())

    @property
    def terms(self) -> int:
        """How many terms it sums."""
        return self.sum.terms

    @property
    def size(self) -> int:
        """How many weights its matrices have."""
        return sum(weight.shape[0] * weight.shape[1] for weight in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.weights[0].device

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """What holds each of its weights."""
        return tuple(rows.linear(self.module) for rows in self.rows())

    def parts(self) -> Mapping[str, nn.Module]:
        """Return the modules that a sparse module would bypass, by dotted name."""
        children = dict.fromkeys(rows.child for rows in self.rows() if rows.child)
        inside = {f"{self.name}.{child}": self.module.get_submodule(child) for child in children}
        return {self.name: self.module, **inside}

    def store(self, linears: Sequence[nn.Module], weights: Sequence[Weight]) -> None:
        """Let linears hold these weights, each of the same values in another layout or the very one that is there.

        What is rows of a linear beside others' stays as it is.

        Args:
            linears: `linears`, as they are, or were before adapters came around them.
            weights: One for each.
        """
        for rows, linear, weight in zip(self.rows(), linears, weights, strict=True):
            holder = holder_of(rows.child, linear)
            if rows.are_all and weight.parts[0] is not holder.read(linear)[0].parts[0]:
                holder.store(linear, weight)


@dataclass(frozen=True)
class Kind:
    """A kind of site.

    Args:
        site: Its class.
        find: Returns the sites of this kind in a model, in the order of layers, or raises UnsupportedModelError.
        part: What its sites are when a token's time is split up, "" where they are inside of such parts.
    """

    site: type[Site]
    find: Callable[[nn.Module], Sequence[Site]]
    part: str = ""


def _check(kind: Kind) -> None:
    instances_of(Kind)(kind)
    SUMS.register(kind.site.sum_class)  # ops know it by its name


SITES: Registry[Kind] = Registry(
    "kind of site", "countdown.sites", name=lambda kind: kind.site.sum_class.kind, check=_check
)
register = SITES.register


def find_sites(model: nn.Module, kinds: Iterable[str]) -> list[Site]:
    """Return the sites of these kinds, those of a kind in the order of layers.

    Raises:
        ConfigError: There is no such kind.
        UnsupportedModelError: See the kinds' own.
    """
    return [site for kind in dict.fromkeys(kinds) for site in SITES.get(kind).find(model)]


def find_parts(model: nn.Module) -> list[Site]:
    """Return the sites into which a token's time is split up; none where the model has no such sites."""
    for kind in SITES:
        if kind.part:
            try:
                return list(kind.find(model))
            except UnsupportedModelError:
                continue
    return []


def check_untouched(site: Site) -> None:
    """Raise UnsupportedModelError if something would be bypassed when the site's module is replaced."""
    for rows in site.rows():
        holder_of(f"{site.name}.{rows.child}" if rows.child else site.name, rows.linear(site.module))
    for name, module in site.parts().items():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) has hooks or a replaced forward, which a sparse module would "
                "bypass; remove them first (offloading by accelerate sets them: load without device_map)."
            )
