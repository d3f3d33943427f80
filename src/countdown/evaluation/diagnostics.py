"""How well an FFN's active sets match those of the exact coefficient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from countdown.errors import UnsupportedModelError
from countdown.models.sites import GatedFFN
from countdown.modules import SparseFFN, running, sparse_sites
from countdown.ops.indicators import COEFFICIENT
from countdown.ops.reference import drop_smallest


@dataclass(frozen=True)
class SelectorQuality:
    """The active sets of one FFN against the exact ones: for each token, the neurons of largest |s_i|, as many as the
    target leaves.

    Args:
        name: The module's name.
        recall: Share of the exact sets that is active.
        precision: Share of the active sets that is exact.
        lost: Share of Σ s_i² over all neurons that is inactive.
        activity: Share of the tokens for which each neuron is active, by neuron.
    """

    name: str
    recall: float
    precision: float
    lost: float
    activity: list[float] = field(default_factory=list, repr=False)


@dataclass
class _Sums:
    both: int = 0
    exact: int = 0
    active: int = 0
    kept: float = 0.0
    mass: float = 0.0
    tokens: int = 0
    active_by_neuron: Tensor | None = None

    def count(self, active: Tensor) -> None:
        """Count who is active, of active sets `[tokens, h]`."""
        found = active.sum(dim=0)
        self.active_by_neuron = found if self.active_by_neuron is None else self.active_by_neuron + found
        self.tokens += len(active)

    def quality(self, name: str) -> SelectorQuality:
        return SelectorQuality(
            name,
            recall=self.both / self.exact if self.exact else 1.0,
            precision=self.both / self.active if self.active else 1.0,
            lost=1 - self.kept / self.mass if self.mass else 0.0,
            activity=[] if self.active_by_neuron is None else (self.active_by_neuron / self.tokens).tolist(),
        )


@dataclass
class _Judge:
    sums: dict[str, _Sums] = field(default_factory=dict)

    def add(self, name: str, module: SparseFFN, x: Tensor) -> None:
        site = GatedFFN(name, module.dense, *module.projections, module.activation)
        size = COEFFICIENT.formula(*(factor.float() for factor in site.project(x)))
        active = module.active(x)
        exact = drop_smallest(size, module.method.drop(module.terms))
        found = self.sums.setdefault(name, _Sums())
        found.both += int((active & exact).sum())
        found.exact += int(exact.sum())
        found.active += int(active.sum())
        found.kept += float((size.double().square() * active).sum())
        found.count(active.flatten(0, -2))
        found.mass += float(size.double().square().sum())


def diagnose(model: nn.Module, windows: Sequence[Tensor] | Tensor) -> list[SelectorQuality]:
    """Return, for each sparse FFN, how its active sets compare with the exact ones while every token is sparse.

    Args:
        model: A sparsified model. Its counters go on counting.
        windows: Token ids, each int64 `[length]`.

    Raises:
        UnsupportedModelError: No FFN of the model is sparse.
    """
    if not any(isinstance(module, SparseFFN) for module in sparse_sites(model).values()):
        raise UnsupportedModelError("no FFN of the model is sparse, so there is nothing to compare.")
    judge = _Judge()
    device = next(model.parameters()).device
    with torch.inference_mode(), running(model, "all"), _watched(model, judge):
        for window in windows:
            model(window[None].to(device), use_cache=False)
    return [found.quality(name) for name, found in judge.sums.items()]


@contextmanager
def _watched(model: nn.Module, judge: _Judge) -> Iterator[None]:
    def watch(name: str) -> Any:
        return lambda module, arguments: judge.add(name, module, arguments[0])

    ffns = {name: module for name, module in sparse_sites(model).items() if isinstance(module, SparseFFN)}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in ffns.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
