"""Finds the sites of a model by structure: gated FFNs and linears in the layers of its text decoder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from countdown.config import check_choice
from countdown.errors import UnsupportedModelError
from countdown.models.recognise import acts_on_tokens, recognise, shaped_like_ffn, ungated, why_not
from countdown.models.sites import GatedFFN, LinearInput, Site, is_linear, linear_sizes

# A class or attribute of this name is a mixture of experts, or part of one. Names only ever refuse.
_EXPERTS = re.compile(r"(^|[a-z_])(moe|experts?)($|[A-Z_])|Mo[Ee]|MOE|Experts?($|[A-Z])")
_WORDS = re.compile(r"[A-Z]+[^A-Z]*|[^A-Z]+")


def find_sites(model: nn.Module, kinds: Iterable[str]) -> list[Site]:
    """Return the sites of these kinds, `ffn` or `linear`, those of a kind in the order of layers.

    Raises:
        UnsupportedModelError: See `find_ffns` and `find_linears`.
    """
    sites: list[Site] = []
    for kind in dict.fromkeys(kinds):
        check_choice("kind of site", kind, _FINDERS)
        sites.extend(_FINDERS[kind](model))
    return sites


def find_ffns(model: nn.Module) -> list[GatedFFN]:
    """Return the gated FFN of every decoder layer, in order.

    A gated FFN is a module with linears of the right shapes, gate and up apart or fused in one, whose forward equals
    the formula on random input at several scales, for one assignment of roles and one known activation. Names play
    no part. On the meta device a randomly initialised copy stands in for the weights.

    Raises:
        UnsupportedModelError: A layer has no such FFN or has experts, or a linear is not a plain `nn.Linear`.
    """
    stacks = _stacks(model)
    _refuse_experts(model, stacks)
    with_ffn = [stack for stack in stacks if any(_candidates(layer) for _, layer in stack)]
    if not with_ffn:
        raise _unsupported(model, _without_ffn([entry for stack in stacks for entry in stack]))
    found: list[GatedFFN] = []
    for path, layer in (entry for stack in with_ffn for entry in stack):
        found.extend(_ffns_of_layer(model, path, layer, found[-1:]))
    return found


def find_linears(model: nn.Module) -> list[LinearInput]:
    """Return every linear in the decoder's layers, in order: of attention and FFN alike.

    Linears of another kind than `nn.Linear` are among them; `check_untouched` refuses them when they are chosen.

    Raises:
        UnsupportedModelError: There are none, or the layers have experts.
    """
    stacks = _stacks(model)
    _refuse_experts(model, stacks)
    found = [
        LinearInput(name, module)
        for stack in stacks
        for path, layer in stack
        for name, module in _outermost(layer, path, is_linear)
    ]
    if not found:
        raise _unsupported(model, "its layers have no torch.nn.Linear.")
    return found


_FINDERS: dict[str, Callable[[nn.Module], Sequence[Site]]] = {"ffn": find_ffns, "linear": find_linears}


def _ffns_of_layer(model: nn.Module, path: str, layer: nn.Module, hint: list[GatedFFN]) -> list[GatedFFN]:
    candidates = [(f"{path}.{name}" if name else path, module) for name, module in _candidates(layer)]
    found = [ffn for name, module in candidates if (ffn := recognise(name, module, hint)) is not None]
    if found:
        return found
    for name, module in candidates:
        if acts_on_tokens(module):
            raise _unsupported(model, why_not(name, module))
    raise _unsupported(model, _without_ffn([(path, layer)]))


def _without_ffn(layers: list[tuple[str, nn.Module]]) -> str:
    """Return, as a sentence, what these layers have in place of a gated FFN."""
    for path, layer in layers:
        if pair := ungated(layer):
            return f"layer {path} ({type(layer).__name__}) has an FFN without a gate: {' and '.join(pair)}."
    path, layer = layers[0]
    parts = ", ".join(f"{name}: {type(child).__name__}" for name, child in layer.named_children())
    return f"layer {path} ({type(layer).__name__}) has no gated FFN that countdown recognises. Its parts are {parts}."


def _unsupported(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} is not supported: {reason}")


def _candidates(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in layer.named_modules() if shaped_like_ffn(module)]


def _stacks(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Return the decoder's lists of layers that have linears, each with its dotted path.

    Where lists are nested at several depths, those of towers and projectors are the deeper ones.
    """
    decoder, prefix = _decoder(model)
    stacks: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, container in _outermost(decoder, prefix, lambda module: isinstance(module, nn.ModuleList)):
        layers = [(f"{path}.{name}", layer) for name, layer in container.named_children()]
        if layers and all(_has_linears(layer) for _, layer in layers):
            stacks[path] = layers
    if not stacks:
        raise _unsupported(model, f"its decoder {type(decoder).__name__} has no list of layers.")
    found = _outer(stacks)
    if _outer(_around_embedding(model, stacks)) != found:
        raise _unsupported(model, f"it does not tell which of {', '.join(stacks)} is its text decoder.")
    return [stacks[path] for path in found]


def _outer(paths: Iterable[str]) -> list[str]:
    """Return the paths of least depth."""
    paths = list(paths)
    depth = min((path.count(".") for path in paths), default=0)
    return [path for path in paths if path.count(".") == depth]


def _around_embedding(model: nn.Module, stacks: Iterable[str]) -> list[str]:
    """Return the stacks inside of the smallest module that has the token embedding and any of them."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        # With nothing to tell them apart, they must be in one place.
        beside = _outer(stacks)[0].rpartition(".")[0]
        return [path for path in stacks if path.rpartition(".")[0] == beside]
    inside = next((name for name, module in model.named_modules() if module is embedding), "")
    while inside:
        inside = inside.rpartition(".")[0]
        if near := [path for path in stacks if path.startswith(f"{inside}.")]:
            return near
    return list(stacks)


def _has_linears(layer: nn.Module) -> bool:
    # A list of bare linears is a part of something, not a stack of layers.
    return linear_sizes(layer) is None and any(linear_sizes(module) for module in layer.modules())


def _outermost(root: nn.Module, path: str, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below `root` that are wanted, without looking inside them, with their dotted names."""
    for name, child in root.named_children():
        inside = f"{path}.{name}" if path else name
        if wanted(child):
            yield inside, child
        else:
            yield from _outermost(child, inside, wanted)


def _decoder(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the text decoder and its dotted name, so that vision and audio towers are left out."""
    get_decoder = getattr(model, "get_decoder", None)
    if not callable(get_decoder):
        raise UnsupportedModelError(f"{type(model).__name__} is not a causal language model of transformers.")
    decoder: nn.Module = get_decoder()
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        # Some models call a linear of their head `decoder`.
        decoder = getattr(model, "base_model", model)
    for name, module in model.named_modules():
        if module is decoder:
            return decoder, name
    raise UnsupportedModelError(f"{type(model).__name__} does not contain the decoder it names.")


def _refuse_experts(model: nn.Module, stacks: list[list[tuple[str, nn.Module]]]) -> None:
    for path, layer in (entry for stack in stacks for entry in stack):
        for name, module in layer.named_modules():
            if name and (_EXPERTS.search(name.rpartition(".")[2]) or _EXPERTS.search(_own_words(layer, module))):
                raise UnsupportedModelError(
                    f"{type(model).__name__} has a mixture of experts ({path}.{name}, {type(module).__name__}); "
                    "countdown supports models whose every layer has one gated FFN."
                )


def _own_words(layer: nn.Module, module: nn.Module) -> str:
    """Return a module's class name without what it shares with its layer's: a family's name tells nothing."""
    family, words = (_WORDS.findall(type(one).__name__) for one in (layer, module))
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(family, words, strict=False))
    return "".join(words[len(list(shared)) :])
