"""The cache of a decode loop, and what a model holds besides that a step may change."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from countdown.errors import UnsupportedModelError

# Tokens that are computed before the first that counts: one to look at the linears, two to record, one to compile.
WARM_UP = 4
# A tensor that a step may change: the dictionary that it is in, its name there, and itself.
Held = tuple[dict[Any, Any], Any, Tensor]
# Names of what no step changes besides keys and values: what every module has, looked at for every prompt otherwise.
_NO_TENSORS = {"keys", "values", *vars(nn.Module())}


def static_cache(model: Any, length: int) -> tuple[Any, list[tuple[Any, int]]]:
    """Return a static cache for so many tokens, and the layers of it that attend to a window of fewer, with that."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache, windows = StaticCache(config=model.config, max_cache_len=length), []
    # A cache that is shorter than a window does not say how wide that is; without a prompt it takes no memory.
    endless = StaticCache(config=model.config, max_cache_len=sys.maxsize)
    for place, layer in enumerate(cache.layers):
        if not getattr(layer, "is_sliding", False):
            continue
        if type(layer) is not StaticSlidingWindowLayer:
            raise UnsupportedModelError(f"{type(model).__name__} has a {type(layer).__name__}, which counts in Python.")
        # It keeps its position in Python. All tokens are kept instead, and the mask hides those outside the window.
        cache.layers[place] = StaticLayer(max_cache_len=length)
        windows.append((cache.layers[place], endless.layers[place].max_cache_len))
    return cache, windows


def length_for(room: int) -> int:
    """Return the length of a cache: a whole number of blocks, for kernels that like them."""
    return -(-(room + WARM_UP) // 128) * 128


def empty(cache: Any, kept: int) -> None:
    """Empty a cache but for the first tokens, in its memory."""
    from transformers.cache_utils import StaticLayer

    layers = [layer for layer in cache.layers if type(layer) is StaticLayer]
    # What was never written is not touched, so that memory that nobody used is not taken either.
    written = [
        held[:, :, kept : filled + WARM_UP]
        for layer, filled in zip(layers, _filled(layers), strict=True)
        for held in (layer.keys, layer.values)
    ]
    lengths = [layer.cumulative_length for layer in layers]
    if layers:
        # As optimisers of torch do: in few launches, of which a short prompt feels a hundred.
        torch._foreach_zero_([*written, *lengths])
        torch._foreach_add_(lengths, kept)
    for layer in cache.layers:
        if type(layer) is not StaticLayer:
            layer.reset()


def _filled(layers: Sequence[Any]) -> list[int]:
    """Return how many tokens each layer of a cache has; the device is waited for once."""
    lengths = [layer.cumulative_length for layer in layers]
    counts: list[int] = torch.stack(lengths).flatten().tolist() if lengths else []
    return counts


def lengthen(cache: Any, length: int, windows: list[tuple[Any, int]]) -> None:
    """Put longer layers, holding the same, in place of those that hold keys and values; also among the windows."""
    from transformers.cache_utils import StaticLayer

    for place, layer in enumerate(cache.layers):
        if not isinstance(layer, StaticLayer):
            continue
        if type(layer) is not StaticLayer:
            raise UnsupportedModelError(f"a {type(layer).__name__} cannot be made longer.")
        longer = StaticLayer(max_cache_len=length)
        longer.lazy_initialization(layer.keys, layer.values)
        longer.keys[:, :, : layer.max_cache_len] = layer.keys
        longer.values[:, :, : layer.max_cache_len] = layer.values
        longer.cumulative_length.copy_(layer.cumulative_length)
        cache.layers[place] = longer
        windows[:] = [(longer if one is layer else one, size) for one, size in windows]


def check_filled(cache: Any, tokens: int) -> None:
    """Raise UnsupportedModelError unless a prompt of so many tokens is in every layer of the cache."""
    attending = [place for place, layer in enumerate(cache.layers) if hasattr(layer, "cumulative_length")]
    filled = dict(zip(attending, _filled([cache.layers[place] for place in attending]), strict=True))
    for place, layer in enumerate(cache.layers):
        states = getattr(layer, "has_previous_state", {})
        if filled.get(place, tokens) != tokens or not all(states.values()):
            raise UnsupportedModelError(f"layer {place} keeps nothing of a prompt in the cache that it is given.")


@contextmanager
def kept_as_it_was(model: nn.Module, layers: Sequence[Any] = (), *, only_if_it_fails: bool = False) -> Iterator[None]:
    """Give a model and the layers of its cache, after the context, all that they held before, but keys and values.

    Raises:
        UnsupportedModelError: Within the context a tensor was replaced by another one, which a replay would not do.
    """
    held = tensors_in(holders_of(model, layers))
    # Outside of inference_mode nobody can change what was made within.
    changeable = [tensor for *_, tensor in held if torch.is_inference_mode_enabled() or not tensor.is_inference()]
    with undone(changeable, only_if_it_fails=only_if_it_fails):
        try:
            yield
            if only_if_it_fails:
                return
            for holder, name, tensor in held:
                if holder.get(name) is not tensor:
                    raise UnsupportedModelError(
                        f"{type(model).__name__} puts another tensor in place of '{name}' at each step."
                    )
        except BaseException:
            for holder, name, tensor in held:
                holder[name] = tensor
            raise


def tensors_in(holders: Sequence[dict[Any, Any]]) -> list[Held]:
    """Return the tensors that a step may change."""
    return [
        (holder, name, value)
        for holder in holders
        for name, value in holder.items()
        if name not in _NO_TENSORS and isinstance(value, Tensor)
    ]


def holders_of(model: nn.Module, layers: Sequence[Any]) -> list[dict[Any, Any]]:
    """Return the dictionaries of attributes and buffers that a model and the layers of its cache have."""
    found = [vars(layer) for layer in layers]
    found += [value for of_layer in found for value in of_layer.values() if isinstance(value, dict)]
    return found + [one for module in model.modules() for one in (module._buffers, vars(module))]


@contextmanager
def undone(tensors: Sequence[Tensor], *, only_if_it_fails: bool = False) -> Iterator[None]:
    """Give tensors their values back after the context."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        only_if_it_fails = False
        raise
    finally:
        if not only_if_it_fails:
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
