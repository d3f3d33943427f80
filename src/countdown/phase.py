"""The phase of a token: generated, prompt, or padding. Said for each token, never guessed from a shape.

A sparsified model has one `Phases`, a hook on its decoder: by default a call with one new token for each sequence is
generation, one with more is prompt. An engine that mixes them in a call says so with `phases`. Where sets are chosen
from prompts the hook also says whose the tokens are, see `sequences`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from countdown import sequences
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.sequences import Sequences

GENERATED, PROMPT, PADDING = range(3)
NAMES = {"generated": GENERATED, "prompt": PROMPT, "padding": PADDING}
Now = int | Tensor | None


class Phases(threading.local):
    """The phase of the tokens of the decoder's present call, for the sparse modules inside of it; each thread's own.

    `now` is one phase for all tokens, a tensor with one for each (uint8, which a captured graph reads anew), or None
    outside of a call.

    Args:
        follows: The number of the model, where some module needs the sequences of a call; else 0. See `sequences`.
    """

    def __init__(self, follows: int = 0) -> None:
        self.now: Now = None
        self.driven = False  # by `phases`, which the hooks then leave alone
        self.follows = follows
        self.sequences: Sequences | None = None  # of the present call
        self._outer: list[tuple[Now, Sequences | None]] = []  # of calls around the present one

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is in no call, and that of another model."""
        return _copied, (bool(self.follows),)

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the decoder runs."""
        self._outer.append((self.now, self.sequences))
        tokens = _new_tokens(decoder, args, kwargs)
        if tokens is None:
            return
        if not self.driven:
            self.now = GENERATED if tokens.shape[1] == 1 else PROMPT
        if self.follows:
            self.sequences = self._followed(decoder, tokens, args, kwargs)

    def after(self, _: nn.Module, __: object, output: object) -> None:
        """The hook after it."""
        if self.sequences is not None:
            self.sequences.leave(output)
        if self._outer:
            self.now, self.sequences = self._outer.pop()

    def _followed(
        self, decoder: nn.Module, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Sequences | None:
        """Return the sequences of a call of tokens `[sequences, tokens, ...]`."""
        count, new = tokens.shape[:2]
        cache = next((c for c in (_argument(decoder, args, kwargs, n) for n in sequences.NAMES) if c is not None), None)
        if self.driven and self.now is GENERATED:
            # Perhaps a step that is captured or recorded, in which no value is read: the driver answers for the cache.
            return sequences.continued(cache, count, self.follows)
        found = sequences.in_call(cache, count, self.follows)
        if self.now is not GENERATED:
            mask = _argument(decoder, args, kwargs, "attention_mask")
            mixed = isinstance(self.now, Tensor)
            found.prompt(mask, new, (self.now == PROMPT, self.now == GENERATED) if mixed else None)  # type: ignore[arg-type]
        return found

    def watch(self, decoder: nn.Module) -> None:
        """Follow the calls of a decoder."""
        decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        decoder.register_forward_hook(self.after, always_call=True)

    def leave(self, decoder: nn.Module) -> None:
        """Undo `watch`."""
        for hooks, beside in (
            (decoder._forward_pre_hooks, decoder._forward_pre_hooks_with_kwargs),
            (decoder._forward_hooks, decoder._forward_hooks_always_called),
        ):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                beside.pop(key, None)


def _copied(follows: bool) -> Phases:
    return Phases(sequences.numbered() if follows else 0)


def _new_tokens(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the ids or embeddings `[sequences, new tokens, ...]` that a decoder was given, by name or place."""
    for name in ("input_ids", "inputs_embeds"):
        value = _argument(decoder, args, kwargs, name)
        if isinstance(value, Tensor):
            return value
    return None


def _argument(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Return what a decoder was given under a name, or in its place; None if nothing."""
    value = kwargs.get(name)
    if value is None and args and name in (names := _parameters(type(decoder).forward)):
        place = names.index(name)
        value = args[place] if place < len(args) else None
    return value


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


@contextmanager
def phases(model: nn.Module, now: str | Tensor) -> Iterator[None]:
    """Within the context, the tokens of a sparsified model's calls from this thread are in these phases.

    Args:
        model: A sparsified model.
        now: `generated`, `prompt` or `padding` for all tokens, or a uint8 tensor of `GENERATED`, `PROMPT` and
            `PADDING` with an entry for each token, in their order, on the model's device. It may change between calls:
            a captured graph reads it anew.

    Raises:
        UnsupportedModelError: The model is not sparsified.
        ConfigError: It is neither, there is no such phase, or the tensor is of another dtype, strided, or elsewhere.

    Example:
        now = torch.tensor([PROMPT, PROMPT, GENERATED, PADDING], dtype=torch.uint8)
        with countdown.phases(model, now):
            model(ids)  # 4 tokens
    """
    modules = _with_phases(model)
    if not modules:
        raise UnsupportedModelError("the model is not sparsified; call countdown.sparsify_(model, profile) first.")
    _check_phases(now, {module.get_buffer("counters").device for module in modules})
    found: Phases = vars(modules[0])["phases"]
    with _driven(found, NAMES[now] if isinstance(now, str) else now, found.sequences):
        yield


@contextmanager
def continuing(model: nn.Module, cache: Any) -> Iterator[None]:
    """Within the context, what a model computes in this thread generates tokens of the sequences in a cache.

    That holds for its decoder's calls, which may be captured or recorded, and for modules that run by themselves. A
    model that is not sparsified, or follows no sequences, is left alone.
    """
    modules = _with_phases(model)
    found: Phases | None = vars(modules[0])["phases"] if modules else None
    if found is None or not found.follows:
        yield
        return
    with _driven(found, GENERATED, sequences.beside(cache)):
        yield


@contextmanager
def _driven(found: Phases, now: Now, whose: Sequences | None) -> Iterator[None]:
    before = found.now, found.driven, found.sequences
    found.now, found.driven, found.sequences = now, True, whose
    try:
        yield
    finally:
        found.now, found.driven, found.sequences = before


def _with_phases(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(vars(module).get("phases"), Phases)]


def _check_phases(now: object, devices: Collection[torch.device]) -> None:
    """Raise ConfigError unless it says the phase of tokens on one of these devices."""
    if isinstance(now, Tensor):
        if now.dtype != torch.uint8 or not now.is_contiguous():
            strided = "" if now.is_contiguous() else ", strided"
            raise ConfigError(f"phases are {now.dtype}{strided}, expected torch.uint8, contiguous.")
        if now.device not in devices:
            raise ConfigError(f"phases are on {now.device}, the model on {', '.join(sorted(map(str, devices)))}.")
    elif not isinstance(now, str) or now not in NAMES:
        raise ConfigError(f"phase is {now!r}, expected one of: {', '.join(NAMES)}, or a uint8 tensor.")
