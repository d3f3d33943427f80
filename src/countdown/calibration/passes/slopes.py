"""How much dropping more terms of each site costs the model's output, all sites being sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from countdown.calibration.passes._base import Assignment
from countdown.errors import UnsupportedModelError
from countdown.finite import not_finite
from countdown.memory import logits_at_once
from countdown.modules import observed
from countdown.ops.reference import drop_smallest
from countdown.sites import Site
from countdown.sums import Sum
from countdown.sums._base import product_of

# A slope is that of a chord this far to either side.
REACH = 0.05


def kl_slopes(
    model: nn.Module,
    assigned: Sequence[Assignment],
    sequences: Sequence[Tensor],
    sparsities: Mapping[str, float],
    threshold: Callable[[str, float], float],
) -> dict[str, float]:
    """Return the derivative of KL(dense ‖ sparse) by the sparsity of each site, at these sparsities.

    To first order, dropping terms with output Δy changes the KL by -∂KL/∂y · Δy. Δy is that of the terms that
    become inactive between `REACH` less and `REACH` more sparsity; ∂KL/∂y, for all sites at once, is one backward
    pass through the sparse model.

    Args:
        model: A dense causal language model in eval mode.
        assigned: Its sites, their methods and weights.
        sequences: Token ids, each int64 `[length]`.
        sparsities: Of each site, by name.
        threshold: From a site's name and a sparsity to the threshold of its weighted indicator.

    Returns:
        Nats per token and unit of sparsity, by site.

    Raises:
        CountdownError: The model's output, or a gradient, is not finite.
        UnsupportedModelError: The model was made under inference_mode.
    """
    if next(model.parameters()).is_inference():
        raise UnsupportedModelError(
            "global allocation needs gradients, and the model was made under torch.inference_mode(): load it outside."
        )
    run = _SlopeRun(assigned, sparsities, threshold)
    device = next(model.parameters()).device
    sites = [entry.site for entry in assigned]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_without_parameter_gradients(model))
        stack.enter_context(observed(model, sites, run.observe))
        stack.enter_context(run.tapping(model))
        for sequence in sequences:
            run.add(model, sequence.clone()[None].to(device))
    for name, change in run.changes.items():
        if not math.isfinite(change):
            raise not_finite(f"the effect of {name} on the model's output is", model)
    tokens = sum(sequence.numel() for sequence in sequences)
    widths = {name: high - low for name, (low, high) in ((name, chord(k)) for name, k in sparsities.items())}
    return {name: total / tokens / widths[name] for name, total in run.changes.items()}


def chord(sparsity: float) -> tuple[float, float]:
    """Return the sparsities between which a slope at `sparsity` is taken."""
    return max(sparsity - REACH, 0.0), min(sparsity + REACH, (1 + sparsity) / 2)


class _SlopeRun:
    """Runs the model dense, then sparse with gradients, and sums the first-order change of the KL by site."""

    def __init__(
        self, assigned: Sequence[Assignment], sparsities: Mapping[str, float], threshold: Callable[[str, float], float]
    ) -> None:
        self.changes = {entry.site.name: 0.0 for entry in assigned}
        self._assigned = {entry.site.name: entry for entry in assigned}
        self._sparsities = sparsities
        self._threshold = threshold
        self._sparse = False
        self._dropped: dict[str, Tensor] = {}
        self._taps: dict[str, Tensor] = {}

    def observe(self, site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor | None:
        if not self._sparse:
            return None
        one = self._assigned[site.name]
        value = one.indicator(sum_, x.detach(), tuple(factor.detach() for factor in factors))
        low, high = (self._active(site, value, sparsity) for sparsity in chord(self._sparsities[site.name]))
        band = torch.where(low & ~high, product_of(factors).detach(), 0)
        self._dropped[site.name] = sum_.weights[-1].product(band)
        return self._active(site, value, self._sparsities[site.name])

    def _active(self, site: Site, value: Tensor, sparsity: float) -> Tensor:
        method = replace(self._assigned[site.name].method, sparsity=sparsity)
        if method.decision == "topk":
            return drop_smallest(value, method.drop(site.terms))
        return value > self._threshold(site.name, sparsity)

    @contextmanager
    def tapping(self, model: nn.Module) -> Iterator[None]:
        """Within the context, the gradient of every site's output is kept."""

        def tap(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
                if not self._sparse:
                    return output
                self._taps[name] = torch.zeros_like(output, requires_grad=True)
                return output + self._taps[name]

            return hook

        with ExitStack() as hooks:
            for name in self._assigned:
                hooks.callback(model.get_submodule(name).register_forward_hook(tap(name)).remove)
            yield

    def add(self, model: nn.Module, ids: Tensor) -> None:
        """Run one sequence `[1, length]`."""
        self._sparse = False
        with torch.no_grad():
            dense = model(input_ids=ids, use_cache=False).logits
        self._sparse = True
        with torch.enable_grad():
            sparse = model(input_ids=ids, use_cache=False).logits
        sparse.backward(_kl_gradient(dense, sparse.detach()))
        for name, tap in self._taps.items():
            assert tap.grad is not None
            self.changes[name] -= (tap.grad.double() * self._dropped[name].double()).sum().item()
        self._taps, self._dropped = {}, {}


def _kl_gradient(dense: Tensor, sparse: Tensor) -> Tensor:
    """Return the derivative of the summed KL(dense ‖ sparse) by the sparse logits: softmax(sparse) - softmax(dense)."""
    step = logits_at_once(dense)
    pairs = zip(dense.split(step, dim=1), sparse.split(step, dim=1), strict=True)
    return torch.cat([(q.float().softmax(-1) - p.float().softmax(-1)).to(q.dtype) for p, q in pairs], dim=1)


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
