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
    changes = _SlopeRun(assigned, sparsities, threshold).over(model, sequences)
    widths = {name: high - low for name, (low, high) in ((name, chord(k)) for name, k in sparsities.items())}
    return {name: change / widths[name] for name, change in changes.items()}


def kl_curvatures(
    model: nn.Module,
    assigned: Sequence[Assignment],
    sequences: Sequence[Tensor],
    sparsities: Mapping[str, float],
    threshold: Callable[[str, float], float],
) -> dict[str, float]:
    """Return the KL that the terms each site drops at the upper end of its `chord` make alone, to second order.

    A change Δy of a site's output makes a KL of ½ Δyᵀ F Δy, F the Fisher information: the mean of g gᵀ over tokens that
    the model itself would write, g the gradient of their log-likelihood by y. One is drawn for each position, in the
    model as it is with all sites sparse, and ½ (g · Δy)² is added up over positions. Unlike a slope it is never below
    0, and it does not see whether sites' errors cancel.

    Arguments and errors are those of `kl_slopes`.

    Returns:
        Nats per token, by site.
    """
    return _CurvatureRun(assigned, sparsities, threshold).over(model, sequences)


def chord(sparsity: float) -> tuple[float, float]:
    """Return the sparsities between which a slope at `sparsity` is taken."""
    return max(sparsity - REACH, 0.0), min(sparsity + REACH, (1 + sparsity) / 2)


class _SlopeRun:
    """Runs the model dense, then sparse with gradients, and sums the first-order change of the KL by site."""

    needs_dense = True

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

    def over(self, model: nn.Module, sequences: Sequence[Tensor]) -> dict[str, float]:
        """Return the sums over sequences, by token."""
        if next(model.parameters()).is_inference():
            raise UnsupportedModelError(
                "global allocation needs gradients, and the model was made under torch.inference_mode(): load it "
                "outside."
            )
        device = next(model.parameters()).device
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(_without_parameter_gradients(model))
            stack.enter_context(observed(model, [one.site for one in self._assigned.values()], self.observe))
            stack.enter_context(self.tapping(model))
            for sequence in sequences:
                self.add(model, sequence.clone()[None].to(device))
        for name, change in self.changes.items():
            if not math.isfinite(change):
                raise not_finite(f"the effect of {name} on the model's output is", model)
        tokens = sum(sequence.numel() for sequence in sequences)
        return {name: change / tokens for name, change in self.changes.items()}

    def observe(self, site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor | None:
        if not self._sparse:
            return None
        one = self._assigned[site.name]
        value = one.indicator(sum_, x.detach(), tuple(factor.detach() for factor in factors))
        active = self._active(site, value, self._sparsities[site.name])
        judged = torch.where(self._judged(site, value, active), product_of(factors).detach(), 0)
        self._dropped[site.name] = sum_.weights[-1].product(judged)
        return active

    def _judged(self, site: Site, value: Tensor, active: Tensor) -> Tensor:
        """Return which terms' effect is estimated."""
        low, high = (self._active(site, value, sparsity) for sparsity in chord(self._sparsities[site.name]))
        return low & ~high

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
            dense = model(input_ids=ids, use_cache=False).logits if self.needs_dense else None
        self._sparse = True
        with torch.enable_grad():
            sparse = model(input_ids=ids, use_cache=False).logits
        sparse.backward(self._gradient(dense, sparse.detach()))
        for name, tap in self._taps.items():
            assert tap.grad is not None
            by_token = (tap.grad.double() * self._dropped[name].double()).sum(dim=-1)
            self.changes[name] += self._change(by_token).item()
        self._taps, self._dropped = {}, {}

    def _gradient(self, dense: Tensor | None, sparse: Tensor) -> Tensor:
        """Return the gradient by the sparse logits that is carried back."""
        assert dense is not None
        return _kl_gradient(dense, sparse)

    def _change(self, by_token: Tensor) -> Tensor:
        """Return what the products of gradient and effect, one a token, add."""
        return -by_token.sum()


class _CurvatureRun(_SlopeRun):
    """Runs the model sparse alone, and sums what the errors of each site make of the KL to second order."""

    needs_dense = False

    def _judged(self, site: Site, value: Tensor, active: Tensor) -> Tensor:
        # At sparsity 0 nothing is dropped, and what would be first is to be known.
        return ~self._active(site, value, chord(self._sparsities[site.name])[1])

    def _gradient(self, dense: Tensor | None, sparse: Tensor) -> Tensor:
        return _drawn_gradient(sparse)

    def _change(self, by_token: Tensor) -> Tensor:
        return by_token.square().sum() / 2


def _kl_gradient(dense: Tensor, sparse: Tensor) -> Tensor:
    """Return the derivative of the summed KL(dense ‖ sparse) by the sparse logits: softmax(sparse) - softmax(dense)."""
    step = logits_at_once(dense)
    pairs = zip(dense.split(step, dim=1), sparse.split(step, dim=1), strict=True)
    return torch.cat([(q.float().softmax(-1) - p.float().softmax(-1)).to(q.dtype) for p, q in pairs], dim=1)


def _drawn_gradient(logits: Tensor) -> Tensor:
    """Return the derivative of the log-likelihood of tokens drawn by these logits: one-hot - softmax."""
    generator = torch.Generator(logits.device).manual_seed(0)
    found = []
    for rows in logits.split(logits_at_once(logits), dim=1):
        shares = rows.float().softmax(-1)
        drawn = torch.multinomial(shares.flatten(0, -2), 1, generator=generator).view(*shares.shape[:-1], 1)
        found.append(-shares.scatter_add(-1, drawn, -torch.ones_like(drawn, dtype=shares.dtype)).to(rows.dtype))
    return torch.cat(found, dim=1)


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
