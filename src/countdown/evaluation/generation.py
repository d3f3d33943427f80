"""Greedy generation with its speed, and where two generations part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from countdown.decoding import DEVICES
from countdown.engine.conversation import encode_chat
from countdown.engine.engine import TURNS, Engine, Request, check_fits
from countdown.engine.sampling import Sampling
from countdown.errors import ConfigError
from countdown.text import is_text


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
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    if not ids:
        template = "" if raw else ", or its chat template (--raw leaves it out),"
        raise ConfigError(f"the tokenizer{template} makes nothing of the prompt.")
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    write: Callable[[str], None] = lambda _: None,
    sampling: Sampling | None = None,
) -> Generation:
    """Generate: in the decode loop; where that does not run or does not fit, by transformers.

    Threads that call it wait for each other: while the loop is prepared the model is not as others expect it. What does
    not fit is logged, as a warning: transformers takes longer.

    Args:
        model: Dense or sparsified.
        tokenizer: Its tokenizer.
        prompt: Token ids `[1, n]`.
        max_new_tokens: At most so many.
        write: Called with each piece of text as it comes.
        sampling: How tokens are chosen; greedily when omitted.

    Raises:
        ConfigError: See `check_fits`.
        UnsupportedModelError: The model's own `generate` fails.
    """
    tokens = prompt[0].tolist()
    check_fits(model, tokens, max_new_tokens)
    if sampling is None:
        sampling = Sampling.of(model.generation_config).with_(temperature=0.0)
    loop = next(model.parameters()).device.type in DEVICES
    request = Request(prompt=tokens, max_new_tokens=max_new_tokens, sampling=sampling, include_stop=True)
    text, times = [], []
    with TURNS, Engine(model, tokenizer, loop=loop) as engine:
        answer = engine.start(request)
        while answer.finish is None:
            text.append(engine.step_of(answer).text)
            times.append(time.perf_counter())
            write(text[-1])
    steps = len(times) - 1
    rate = steps / (times[-1] - times[0]) if steps > 0 else None
    return Generation(answer.tokens, "".join(text), rate, by=answer.by)


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the index of the first token in which two generations differ, None if they do not."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))
