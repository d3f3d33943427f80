"""The phase of a token: generated, prompt, or padding. Said for each token, never guessed from a shape.

A sparsified model has one `Phases`, a hook on its decoder: by default a call with one new token for each sequence is
generation, one with more is prompt. An engine that mixes them in a call says so with `phases`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from countdown.errors import ConfigError, UnsupportedModelError

GENERATED, PROMPT, PADDING = range(3)
NAMES = {"generated": GENERATED, "prompt": PROMPT, "padding": PADDING}
Now = int | Tensor | None


class Phases:
    """The phase of the tokens of the decoder's present call, for the sparse modules inside of it.

    `now` is one phase for all tokens, a tensor with one for each (uint8, which a captured graph reads anew), or None
    outside of a call.
    """

    def __init__(self) -> None:
        self.now: Now = None
        self.driven = False  # by `phases`, which the hook then leaves alone

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the decoder runs."""
        if self.driven:
            return
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        tokens = next((value for value in given if isinstance(value, Tensor)), None)
        if tokens is not None:
            self.now = GENERATED if tokens.shape[1] == 1 else PROMPT

    def after(self, *_: object) -> None:
        """The hook after it."""
        if not self.driven:
            self.now = None

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


@contextmanager
def phases(model: nn.Module, now: str | Tensor) -> Iterator[None]:
    """Within the context, the tokens of a sparsified model's calls are in these phases.

    Args:
        model: A sparsified model.
        now: `generated`, `prompt` or `padding` for all tokens, or a uint8 tensor of `GENERATED`, `PROMPT` and
            `PADDING` with an entry for each token, in their order, on the model's device. It may change between calls:
            a captured graph reads it anew.

    Raises:
        UnsupportedModelError: The model is not sparsified.
        ConfigError: There is no such phase, or the tensor is of another dtype.

    Example:
        now = torch.tensor([PROMPT, PROMPT, GENERATED, PADDING], dtype=torch.uint8)
        with countdown.phases(model, now):
            model(ids)  # 4 tokens
    """
    known = (vars(module).get("phases") for module in model.modules())
    found = next((phases for phases in known if isinstance(phases, Phases)), None)
    if found is None:
        raise UnsupportedModelError("the model is not sparsified; call countdown.sparsify_(model, profile) first.")
    if isinstance(now, str) and now not in NAMES:
        raise ConfigError(f"phase is '{now}', expected one of: {', '.join(NAMES)}, or a tensor.")
    if isinstance(now, Tensor) and now.dtype != torch.uint8:
        raise ConfigError(f"phases are {now.dtype}, expected torch.uint8.")
    before = found.now, found.driven
    found.now, found.driven = NAMES[now] if isinstance(now, str) else now, True
    try:
        yield
    finally:
        found.now, found.driven = before
