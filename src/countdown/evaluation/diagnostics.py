"""How well active sets match those of the exact coefficient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from countdown.errors import UnsupportedModelError
from countdown.modules import SparseModule, running, sparse_modules
from countdown.ops.reference import drop_smallest
from countdown.sums._base import product_of


@dataclass(frozen=True)
class SelectorQuality:
    """The active sets of one module against the exact ones: for each token, the terms of largest coefficient (of an FFN
    the neurons of largest |s_i|), as many as the target leaves.

    Args:
        name: The module's name.
        recall: Share of the exact sets that is active.
        precision: Share of the active sets that is exact.
        lost: Share of Σ s_i² over all terms that is inactive.
        activity: Share of the tokens for which each term is active, by term.
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
    active_by_term: Tensor | None = None

    def count(self, active: Tensor) -> None:
        """Count who is active, of active sets `[tokens, terms]`."""
        found = active.sum(dim=0)
        self.active_by_term = found if self.active_by_term is None else self.active_by_term + found
        self.tokens += len(active)

    def quality(self, name: str) -> SelectorQuality:
        return SelectorQuality(
            name,
            recall=self.both / self.exact if self.exact else 1.0,
            precision=self.both / self.active if self.active else 1.0,
            lost=1 - self.kept / self.mass if self.mass else 0.0,
            activity=[] if self.active_by_term is None else (self.active_by_term.double() / self.tokens).tolist(),
        )


@dataclass
class _Judge:
    sums: dict[str, _Sums] = field(default_factory=dict)

    def add(self, name: str, module: SparseModule, x: Tensor) -> None:
        size = product_of([factor.float() for factor in module.site.sum.project(x)]).abs()
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
    """Return, for each sparse module, how its active sets compare with the exact ones while every token is sparse.

    Args:
        model: A sparsified model. Its counters go on counting.
        windows: Token ids, each int64 `[length]`.

    Raises:
        UnsupportedModelError: The model is not sparsified.
    """
    if not sparse_modules(model):
        raise UnsupportedModelError("the model is not sparsified, so there is nothing to compare.")
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

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in sparse_modules(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
