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

    for layer in cache.layers:
        if type(layer) is not StaticLayer:
            layer.reset()
            continue
        # What was never written is not touched, so that memory that nobody used is not taken either.
        end = int(layer.cumulative_length) + WARM_UP
        for held in (layer.keys, layer.values):
            held[:, :, kept:end].zero_()
        layer.cumulative_length.fill_(kept)


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
    for place, layer in enumerate(cache.layers):
        attends, states = hasattr(layer, "cumulative_length"), getattr(layer, "has_previous_state", {})
        if (attends and int(layer.cumulative_length) != tokens) or not all(states.values()):
            raise UnsupportedModelError(f"layer {place} keeps nothing of a prompt in the cache that it is given.")


@contextmanager
def kept_as_it_was(model: nn.Module, layers: Sequence[Any] = (), *, only_if_it_fails: bool = False) -> Iterator[None]:
    """Give a model and the layers of its cache, after the context, all that they held before, but keys and values.

    Raises:
        UnsupportedModelError: Within the context a tensor was replaced by another one, which a replay would not do.
    """
    held = [(holder, name, holder[name]) for holder, name in _holders(model, layers)]
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


def tensors_of(model: nn.Module, layers: Sequence[Any]) -> list[int]:
    """Return which tensors a model and the layers of its cache hold that a step may change."""
    return [id(holder[name]) for holder, name in _holders(model, layers)]


def _holders(model: nn.Module, layers: Sequence[Any]) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Yield where tensors are held that a step may change: the dictionary, and the name in it."""
    dictionaries = [vars(layer) for layer in layers]
    dictionaries += [value for of_layer in dictionaries for value in of_layer.values() if isinstance(value, dict)]
    for module in model.modules():
        dictionaries += [module._buffers, vars(module)]
    for dictionary in dictionaries:
        yield from (
            (dictionary, name)
            for name, value in dictionary.items()
            if isinstance(value, Tensor) and name not in ("keys", "values")
        )


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
