"""Finds the gated FFN of every layer."""

from __future__ import annotations

from torch import nn

from countdown.autocast import without_autocast
from countdown.sites._base import Kind, register
from countdown.sites.decoder import refuse_experts, stacks, unsupported
from countdown.sites.gated import GatedFFN
from countdown.sites.recognise import acts_on_tokens, recognise, shaped_like_ffn, ungated, why_not


@without_autocast()
def find_ffns(model: nn.Module) -> list[GatedFFN]:
    """Return the gated FFN of every decoder layer, in order.

    A gated FFN is a module with linears of the right shapes, gate and up apart or fused in one, whose forward equals
    the formula on random input at several scales, for one assignment of roles and one known activation. Names play
    no part. On the meta device a randomly initialised copy stands in for the weights.

    Raises:
        UnsupportedModelError: A layer has no such FFN or has experts, or a linear is not a plain `nn.Linear`.
    """
    found_stacks = stacks(model)
    refuse_experts(model, found_stacks)
    with_ffn = [stack for stack in found_stacks if any(_candidates(layer) for _, layer in stack)]
    if not with_ffn:
        raise unsupported(model, _without_ffn([entry for stack in found_stacks for entry in stack]))
    found: list[GatedFFN] = []
    for path, layer in (entry for stack in with_ffn for entry in stack):
        found.extend(_ffns_of_layer(model, path, layer, found[-1:]))
    return found


def _ffns_of_layer(model: nn.Module, path: str, layer: nn.Module, hint: list[GatedFFN]) -> list[GatedFFN]:
    candidates = [(f"{path}.{name}" if name else path, module) for name, module in _candidates(layer)]
    found = [ffn for name, module in candidates if (ffn := recognise(name, module, hint)) is not None]
    if found:
        return found
    for name, module in candidates:
        if acts_on_tokens(module):
            raise unsupported(model, why_not(name, module))
    raise unsupported(model, _without_ffn([(path, layer)]))


def _without_ffn(layers: list[tuple[str, nn.Module]]) -> str:
    """Return, as a sentence, what these layers have in place of a gated FFN."""
    for path, layer in layers:
        if pair := ungated(layer):
            return f"layer {path} ({type(layer).__name__}) has an FFN without a gate: {' and '.join(pair)}."
    path, layer = layers[0]
    parts = ", ".join(f"{name}: {type(child).__name__}" for name, child in layer.named_children())
    return f"layer {path} ({type(layer).__name__}) has no gated FFN that countdown recognises. Its parts are {parts}."


def _candidates(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in layer.named_modules() if shaped_like_ffn(module)]


register(Kind(GatedFFN, find_ffns, part="ffn"))
