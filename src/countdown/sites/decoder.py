"""The text decoder of a model: its lists of layers, and what is refused in them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from countdown.errors import UnsupportedModelError
from countdown.sites.holders import linear_sizes

# A class or attribute of this name is a mixture of experts, or part of one. Names only ever refuse.
_EXPERTS = re.compile(r"(^|[a-z_])(moe|experts?)($|[A-Z_])|Mo[Ee]|MOE|Experts?($|[A-Z])")
_WORDS = re.compile(r"[A-Z]+[^A-Z]*|[^A-Z]+")


def unsupported(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} is not supported: {reason}")


def stacks(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Return the decoder's lists of layers that have linears, each with its dotted path.

    Where lists are nested at several depths, those of towers and projectors are the deeper ones.
    """
    decoder, prefix = decoder_of(model)
    stacks: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, container in outermost(decoder, prefix, lambda module: isinstance(module, nn.ModuleList)):
        layers = [(f"{path}.{name}", layer) for name, layer in container.named_children()]
        if layers and all(_has_linears(layer) for _, layer in layers):
            stacks[path] = layers
    if not stacks:
        raise unsupported(model, f"its decoder {type(decoder).__name__} has no list of layers.")
    found = _outer(stacks)
    if _outer(_around_embedding(model, stacks)) != found:
        raise unsupported(model, f"it does not tell which of {', '.join(stacks)} is its text decoder.")
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


def outermost(root: nn.Module, path: str, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below `root` that are wanted, without looking inside them, with their dotted names."""
    for name, child in root.named_children():
        inside = f"{path}.{name}" if path else name
        if wanted(child):
            yield inside, child
        else:
            yield from outermost(child, inside, wanted)


def decoder_of(model: nn.Module) -> tuple[nn.Module, str]:
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


def refuse_experts(model: nn.Module, stacks: list[list[tuple[str, nn.Module]]]) -> None:
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
