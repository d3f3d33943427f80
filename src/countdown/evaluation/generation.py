"""Greedy generation with its speed, and where two generations part."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from countdown.decoding import DecodeLoop
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import check_known, context_of, foreign
from countdown.text import is_text

# Settings of a checkpoint that change nothing of what greedy decoding writes, or that it heeds.
_GREEDY = {
    "bos_token_id", "cache_implementation", "do_sample", "eos_token_id", "max_length", "pad_token_id", "temperature",
    "top_k", "top_p", "transformers_version", "use_cache", "_from_model_config",
}  # fmt: skip

# Of threads that generate; one that is called while it writes may.
_TURNS = threading.RLock()


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Args:
        tokens: The new tokens.
        text: The same, decoded.
        tokens_per_s: Speed of the tokens after the first, which pays for the prompt; None for fewer than two.
        by: What ran: `decode loop` or `transformers`.
    """

    tokens: list[int]
    text: str
    tokens_per_s: float | None
    by: str


@dataclass
class _Stream(BaseStreamer):  # type: ignore[misc]
    """Receives tokens as they come; hands on text as it becomes certain, and keeps the times."""

    tokenizer: Any
    write: Callable[[str], None]
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    written: str = ""
    prompt_seen: bool = False

    def put(self, value: torch.Tensor) -> None:
        """Receive what transformers' `generate` made; first comes the prompt."""
        if self.prompt_seen:
            self.add(value.flatten().tolist())
        self.prompt_seen = True

    def add(self, tokens: list[int]) -> None:
        """Receive new tokens."""
        self.times.append(time.perf_counter())
        self.tokens.extend(tokens)
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
        ConfigError: The prompt is empty, no text, or nothing is left of it.
        UnsupportedModelError: The chat template fails.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty.")
    if not is_text(prompt):
        raise ConfigError("the prompt is not text in UTF-8.")
    if raw or not tokenizer.chat_template:
        ids = tokenizer(prompt)["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}]
        with foreign("the tokenizer's chat template fails", "Leave it out (--raw), or mend it."):
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        template = "" if raw else ", or its chat template (--raw leaves it out),"
        raise ConfigError(f"the tokenizer{template} makes nothing of the prompt.")
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def check_fits(model: nn.Module, prompt: torch.Tensor, max_new_tokens: int) -> None:
    """Check that a model can read a prompt and answer it.

    Args:
        model: Dense or sparsified.
        prompt: Token ids `[1, n]`.
        max_new_tokens: At most so many.

    Raises:
        ConfigError: Prompt and new tokens exceed the model's context, or it does not know a token.
    """
    check_known(model, prompt)
    context, length = context_of(model.config), prompt.shape[1]
    if context is None or length + max_new_tokens <= context:
        return
    fits = f"shorten it to {context - max_new_tokens}" if max_new_tokens < context else ""
    fewer = f"ask for {context - length} new ones (max_new_tokens)" if length < context else ""
    raise ConfigError(
        f"the prompt has {length} tokens, which with {max_new_tokens} new ones is longer than the model's context of "
        f"{context}: {' or '.join(filter(None, [fits, fewer]))}."
    )


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    write: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Generate greedily: on a CPU in the decode loop, elsewhere and where that does not fit by `model.generate()`.

    Threads that call it wait for each other: while the loop is prepared the model is not as others expect it.

    Args:
        model: Dense or sparsified.
        tokenizer: Its tokenizer.
        prompt: Token ids `[1, n]`.
        max_new_tokens: At most so many.
        write: Called with each piece of text as it comes.

    Raises:
        ConfigError: `max_new_tokens` is below 1, or see `check_fits`.
        UnsupportedModelError: The model's own `generate` fails.
    """
    with _TURNS:
        return _generated(model, tokenizer, prompt, max_new_tokens, write)


def _generated(
    model: nn.Module, tokenizer: Any, prompt: torch.Tensor, max_new_tokens: int, write: Callable[[str], None]
) -> Generation:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
    check_fits(model, prompt, max_new_tokens)
    stream = _Stream(tokenizer, write)
    loop = _decode_loop(model, prompt, max_new_tokens)
    if loop is None:
        remedy = "If a setting in generation_config.json asks for that, remove it."
        with foreign(f"{type(model).__name__}.generate fails", remedy):
            _generate(model, tokenizer, prompt, max_new_tokens, stream)
    else:
        _decode(loop, _ends(model), stream)
    steps = len(stream.times) - 1
    rate = steps / (stream.times[-1] - stream.times[0]) if steps > 0 else None
    return Generation(stream.tokens, stream.text(), rate, by="transformers" if loop is None else "decode loop")


def _decode_loop(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> DecodeLoop | None:
    """Return the loop, None where it would write something else or be no faster.

    On a GPU it is compiled first, which takes longer than most answers.
    """
    settings = model.generation_config.to_diff_dict()  # type: ignore[operator, union-attr]
    heeded = all(name in _GREEDY or value in (None, 0, 1) for name, value in settings.items())
    if next(model.parameters()).device.type != "cpu" or not heeded:
        return None
    try:
        return DecodeLoop(model, prompt, new_tokens=new_tokens)
    except UnsupportedModelError:
        return None


def _decode(loop: DecodeLoop, ends: set[int], stream: _Stream) -> None:
    while loop.left:
        token = int(loop.run(1))
        stream.add([token])
        if token in ends:
            break
    stream.end()


def _ends(model: nn.Module) -> set[int]:
    """Return the tokens after which a model has nothing more to say."""
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _generate(model: nn.Module, tokenizer: Any, prompt: torch.Tensor, new_tokens: int, stream: _Stream) -> None:
    ids = prompt.to(next(model.parameters()).device)
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        # Checkpoints may ship defaults for sampling, which greedy decoding would warn about, and for beams.
        num_beams=1,
        num_return_sequences=1,
        temperature=None,
        top_p=None,
        top_k=None,
        streamer=stream,
        tokenizer=tokenizer,  # for a checkpoint's `stop_strings`
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the index of the first token in which two generations differ, None if they do not."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))
