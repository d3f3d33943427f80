"""Greedy generation with its speed, and where two generations part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from countdown.errors import ConfigError
from countdown.models.loading import check_context


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Args:
        tokens: The new tokens.
        text: The same, decoded.
        tokens_per_s: Speed of the tokens after the first, which pays for the prompt; None for fewer than two.
    """

    tokens: list[int]
    text: str
    tokens_per_s: float | None


@dataclass
class _Stream(BaseStreamer):  # type: ignore[misc]
    """Receives tokens from `generate`; hands on text as it becomes certain, and keeps the times."""

    tokenizer: Any
    write: Callable[[str], None]
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    written: str = ""
    prompt_seen: bool = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.tokens.extend(value.flatten().tolist())
        text = self.text()
        # A character of several tokens decodes to U+FFFD until it is complete.
        if not text.endswith("�"):
            self._write(text)

    def end(self) -> None:
        self._write(self.text())

    def text(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        self.write(text[len(self.written) :])
        self.written = text


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool = False) -> torch.Tensor:
    """Return the prompt's tokens `[1, n]`, in the tokenizer's chat template unless `raw` or it has none.

    Raises:
        ConfigError: The prompt is empty.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty.")
    if raw or not tokenizer.chat_template:
        ids = tokenizer(prompt)["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return torch.tensor([ids])


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    write: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Generate greedily by the model's own `generate()`.

    Args:
        model: Dense or sparsified.
        tokenizer: Its tokenizer.
        prompt: Token ids `[1, n]`.
        max_new_tokens: At most so many.
        write: Called with each piece of text as it comes.

    Raises:
        ConfigError: `max_new_tokens` is below 1, or prompt and new tokens exceed the model's context.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
    check_context(model, prompt.shape[1] + max_new_tokens)
    stream = _Stream(tokenizer, write)
    device = next(model.parameters()).device
    ids = prompt.to(device)
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        # Checkpoints may ship sampling defaults, which greedy decoding would warn about.
        temperature=None,
        top_p=None,
        top_k=None,
        streamer=stream,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    steps = len(stream.times) - 1
    rate = steps / (stream.times[-1] - stream.times[0]) if steps > 0 else None
    return Generation(stream.tokens, stream.text(), rate)


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the index of the first token in which two generations differ, None if they do not."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))
