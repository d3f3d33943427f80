"""Ops as tests call them: the arguments of an FFN or a linear spelled out, for one backend or as torch dispatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from countdown.methods import method
from countdown.modules import SparseModule
from countdown.ops import backends
from countdown.phase import Phases
from countdown.sites.decoder import decoder_of
from countdown.sites.ffn import find_ffns
from countdown.weights import Plain, Weight

# The options of an op to which active sets are given.
FORM = ("kind", "formats", "activation", "compensation")


class Ops:
    """Calls of one backend.

    Args:
        name: `reference`, `cpu`, `triton`, or None for what torch dispatches to.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name

    def op(self, name: str) -> Callable[..., Tensor]:
        if self.name is None:
            return getattr(torch.ops.countdown, name)
        found = [backend for backend in backends.BACKENDS.values() if backend.name == self.name]
        return backends.adapted(found[0] if found else None, name)

    def sparse_ffn(self, x, weights, biases, per_neuron, counters, *, phases=None, **how) -> Tensor:
        tensors, options = arguments(x, weights, biases, **how)
        return self.op("sparse")(*tensors, per_neuron, counters, phases, **options)

    def select(self, x, weights, biases, per_neuron, *, phases=None, **how) -> Tensor:
        tensors, options = arguments(x, weights, biases, **how)
        return self.op("select")(*tensors, per_neuron, phases, **options)

    def given_ffn(self, x, weights, biases, active, *, activation, counters=None, phases=None, added=()) -> Tensor:
        tensors, options = arguments(x, weights, biases, activation=activation, added=added)
        return self.op("given")(*tensors, active, counters, phases, **{k: options[k] for k in FORM})

    def sparse_linear(self, x, weight, bias, per_channel, counters, *, phases=None, **how) -> Tensor:
        tensors, options = arguments(x, [weight], [bias], kind="linear", activation="", **how)
        return self.op("sparse")(*tensors, per_channel, counters, phases, **options)

    def select_linear(self, x, weight, bias, per_channel, *, phases=None, **how) -> Tensor:
        tensors, options = arguments(x, [weight], [bias], kind="linear", activation="", **how)
        return self.op("select")(*tensors, per_channel, phases, **options)

    def given_linear(self, x, weight, bias, active, *, counters=None, added=()) -> Tensor:
        tensors, options = arguments(x, [weight], [bias], kind="linear", activation="", added=added)
        return self.op("given")(*tensors, active, counters, None, **{k: options[k] for k in FORM})


def written(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    """Greedy tokens after a prompt `[sequences, tokens]`, on the CPU: 12, the model's own `generate`."""
    mask = more.pop("attention_mask", torch.ones_like(ids)).to(model.device)
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids.to(model.device), attention_mask=mask, **how, **more)[:, ids.shape[1] :].cpu()


REFERENCE, CPU, TRITON, DISPATCHED = Ops("reference"), Ops("cpu"), Ops("triton"), Ops(None)


def arguments(
    x: Tensor,
    weights: Sequence[Tensor | Weight],
    biases: Sequence[Tensor | None],
    *,
    activation: str,
    kind: str = "ffn",
    proxy: Sequence[Weight] | None = None,
    indicator: str = "up",
    decision: str = "threshold",
    drop: int = 0,
    added: Sequence[Tensor | Weight] = (),
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an op before its own tensors, and its options."""
    every = (*weights, *(proxy or ()), *added)
    stored = [weight if isinstance(weight, Weight) else Plain([weight]) for weight in every]
    options = {
        "kind": kind,
        "formats": [weight.format for weight in stored],
        "activation": activation,
        "selector": indicator,
        "rule": decision,
        "drop": drop,
        "compensation": "" if not added else "svd" if kind == "linear" else "affine",
    }
    return (x, [part for weight in stored for part in weight.parts], list(biases)), options


def sparse_module(site, config, per_term, *, apply_to, phases=None, **more) -> SparseModule:
    """A module in place of a site, with phases of its own unless they are given."""
    return SparseModule(site, config, per_term, phases=phases or Phases(), apply_to=apply_to, **more)


def made_sparse(model: nn.Module, *, per_term: float, apply_to: str = "decode") -> None:
    """Put modules of m-countdown in place of the FFNs of a model, all with one threshold: nothing is calibrated."""
    phases, chosen = Phases(), method("m-countdown", sparsity=0.5)
    phases.watch(decoder_of(model)[0])
    for ffn in find_ffns(model):
        thresholds = torch.full((ffn.h,), per_term)
        model.set_submodule(ffn.name, sparse_module(ffn, chosen, thresholds, apply_to=apply_to, phases=phases))
