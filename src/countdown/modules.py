"""The modules that run in place of a model's FFNs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from countdown.errors import UnsupportedModelError
from countdown.methods import Method
from countdown.models.ffn import GatedFFN
from countdown.ops import reference  # noqa: F401  (registers the ops)

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLY_TO = ("decode", "all")


class SparseFFN(nn.Module):
    """A gated FFN that computes, for each token, only the active neurons.

    It adopts the children of the module it replaces, so names, parameters and `state_dict` stay as they are.
    A token's active set depends on its own values and its phase alone: a call with one new token for each
    sequence is generation, one with more is prompt.

    Args:
        ffn: The FFN to replace; its module is kept and gives the dense path.
        method: What decides, with its settings.
        per_neuron: float32 `[h]`: the thresholds τ_i of a threshold decision, the weights m_i of topk.
        apply_to: `decode` (the prompt is dense) or `all`.
    """

    per_neuron: Tensor
    counters: Tensor

    def __init__(self, ffn: GatedFFN, method: Method, per_neuron: Tensor, *, apply_to: str) -> None:
        super().__init__()
        for name, child in ffn.module.named_children():
            self.add_module(name, child)
        # In a tuple, so that its parameters are not registered twice.
        self._dense = (ffn.module,)
        self.roles = (ffn.gate_name, ffn.up_name, ffn.down_name)
        self.activation = ffn.activation
        self.d, self.h = ffn.d, ffn.h
        self.method = method
        self.apply_to = apply_to
        self.forced_dense = False
        device = ffn.linears[0].weight.device
        # Made under inference_mode, the counters could not be counted up outside of it.
        with torch.inference_mode(False):
            self.register_buffer("per_neuron", per_neuron.to(device).clone(), persistent=False)
            self.register_buffer("counters", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        self.eval()

    @property
    def dense(self) -> nn.Module:
        """The module this one replaces. It shares every parameter with it."""
        return self._dense[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return y `[..., d]` for x `[..., d]`, the second last dimension counting a sequence's new tokens.

        Raises:
            UnsupportedModelError: In training mode, or when gradients are recorded.
        """
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise UnsupportedModelError(
                "a sparsified model is for inference: call model.eval() and run it under torch.no_grad() or "
                "torch.inference_mode(), or undo it with countdown.restore_(model)."
            )
        if self.forced_dense or (self.apply_to == "decode" and x.shape[-2] != 1):
            y: Tensor = self.dense(x)
            return y
        gate, up, down = (self.get_submodule(name) for name in self.roles)
        return torch.ops.countdown.sparse_ffn(  # type: ignore[no-any-return]
            x,
            [gate.weight, up.weight, down.weight],
            [gate.bias, up.bias, down.bias],
            self.per_neuron,
            self.counters,
            decision=self.method.decision,
            drop=self.method.drop(self.h),
            indicator=self.method.indicator.name,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """Name what decides, for `print(model)`."""
        return f"{self.method}, apply_to={self.apply_to}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseFFN:
        # model.half() and the like cast float buffers; thresholds keep their bits and only change device.
        exact = self.per_neuron
        super()._apply(fn, recurse)
        self.per_neuron = exact.to(self.per_neuron.device)
        return self


# Called with an FFN and its a = act(g) and u, each [..., h]; returns the active set [..., h], or None for all.
Observer = Callable[[GatedFFN, Tensor, Tensor], Tensor | None]


class ObservedFFN(nn.Module):
    """A gated FFN that shows its activations as it computes; stands in during calibration.

    Args:
        ffn: The FFN to stand in for.
        observe: Called at every forward.
    """

    def __init__(self, ffn: GatedFFN, observe: Observer) -> None:
        super().__init__()
        self._ffn = ffn
        self._observe = observe

    def forward(self, x: Tensor) -> Tensor:
        """Return y `[..., d]`, of the active neurons that the observer names."""
        a, u = self._ffn.project(x)
        active = self._observe(self._ffn, a, u)
        s = a * u
        return self._ffn.combine(s if active is None else torch.where(active, s, 0))


@contextmanager
def observed(model: nn.Module, ffns: list[GatedFFN], observe: Observer) -> Iterator[None]:
    """Within the context, call `observe` at every forward of every FFN."""
    try:
        for ffn in ffns:
            model.set_submodule(ffn.name, ObservedFFN(ffn, observe))
        yield
    finally:
        for ffn in ffns:
            model.set_submodule(ffn.name, ffn.module)


def check_dense(model: nn.Module) -> None:
    """Raise UnsupportedModelError if `model` is sparsified or in training mode."""
    if sparse_ffns(model):
        raise UnsupportedModelError("the model is sparsified already; undo it with countdown.restore_(model).")
    if model.training:
        raise UnsupportedModelError("the model is in training mode; call model.eval() first.")


def sparse_ffns(model: nn.Module) -> dict[str, SparseFFN]:
    """Return the sparse FFNs of `model` by name; empty for a model that is not sparsified."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseFFN)}


@contextmanager
def running(model: nn.Module, mode: str) -> Iterator[None]:
    """Within the context, run a sparsified model as `dense`, or sparse on `decode` or `all` tokens."""
    modules = sparse_ffns(model).values()
    before: list[tuple[Any, ...]] = [(module.apply_to, module.forced_dense) for module in modules]
    try:
        for module in modules:
            module.forced_dense = mode == "dense"
            module.apply_to = module.apply_to if mode == "dense" else mode
        yield
    finally:
        for module, (apply_to, forced_dense) in zip(modules, before, strict=True):
            module.apply_to, module.forced_dense = apply_to, forced_dense
