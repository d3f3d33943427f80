"""Where the next token is chosen: on the host by `Sampler`, or where the logits are.

A GPU goes on with the token that it has chosen itself, so that the host reads it while the step after it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from countdown.decoding import argmax, on_device
from countdown.engine.sampling import NEVER, NOT_FINITE, Chosen, Sampler, Sampling
from countdown.errors import UnsupportedModelError

# Types of device that choose themselves.
CHOOSING = {"cuda"}
# Returns what was chosen, once it is known.
Coming = Callable[[], Chosen]


class Chooser(Protocol):
    """Chooses the tokens of one answer.

    Args:
        ahead: Whether the next step may begin before a token is read.
    """

    ahead: bool

    def choose(self, logits: Tensor, token: Tensor) -> Coming:
        """Choose the next token.

        Args:
            logits: Float `[1, vocabulary]`.
            token: Int64 `[1, 1]`: where the largest of them is. It becomes the token that is chosen.

        Returns:
            What reads it, and raises UnsupportedModelError where the largest logit is not finite.
        """
        ...


def chooser(sampling: Sampling, prompt: Sequence[int], device: torch.device) -> Chooser:
    """Return what chooses the tokens of an answer on a device."""
    return (OnDevice if device.type in CHOOSING else OnHost)(sampling, prompt)


class OnHost:
    """See `Chooser`.

    Args:
        sampling: How.
        prompt: Its tokens, which a repetition penalty counts, too.
    """

    ahead = False

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampler = Sampler(sampling, list(prompt))

    def choose(self, logits: Tensor, token: Tensor) -> Coming:
        """See `Chooser.choose`."""
        if self._sampler.sampling.is_plain:
            found = Chosen(int(token))
        else:
            found = self._sampler.choose(logits[0])
            token.fill_(found.token)
        return lambda: found


class OnDevice:
    """See `Chooser`; nothing but what is chosen is copied to the host.

    Args:
        sampling: How. With a seed it draws other tokens than on the host.
        prompt: Its tokens, which a repetition penalty counts, too.
    """

    ahead = True

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling, self._prompt = sampling, prompt
        self._generator = np.random.default_rng(None if sampling.seed is None else sampling.seed % 2**64)
        # Of each token twice how often the answer has it, and one more if the prompt does.
        self._counts: Tensor | None = None

    def choose(self, logits: Tensor, token: Tensor) -> Coming:
        """See `Chooser.choose`."""
        if self._sampling.is_plain:
            return _read(token)
        adjusted = self._penalised(logits) if self._sampling.penalises else logits
        most = self._draw(adjusted, token)
        if self._counts is not None:
            self._counts.index_add_(0, token.view(1), torch.full_like(token.view(1), 2, dtype=torch.int32))
        if self._sampling.logprobs is None:
            return _read(token, most)
        logprobs = logits[0].float().log_softmax(-1).clamp(min=NEVER)
        top = logprobs.topk(min(self._sampling.logprobs, len(logprobs)))
        return _read(token, most, logprobs.index_select(0, token.view(1)), top.indices, top.values)

    def _draw(self, logits: Tensor, token: Tensor) -> Tensor:
        """Put the next token into `token`; return the largest logit `[1]`, NaN if any is."""
        settings = self._sampling
        if settings.temperature == 0:
            token.copy_(argmax(logits))
            return logits[0].index_select(0, token.view(1))
        seed = int(self._generator.integers(2**63))
        drawn, most = torch.ops.countdown.draw_one(
            logits, settings.temperature, settings.top_k, settings.top_p, settings.min_p, seed
        )
        token.copy_(drawn)
        found: Tensor = most
        return found

    def _penalised(self, logits: Tensor) -> Tensor:
        """Return logits with what prompt and answer have made less likely; see `Sampler`."""
        if self._counts is None:
            self._counts = torch.zeros(logits.shape[1], dtype=torch.int32, device=logits.device)
            self._counts[torch.tensor(sorted(set(self._prompt)), dtype=torch.int64, device=logits.device)] = 1
        values, settings = logits.float(), self._sampling
        penalty, times = settings.repetition_penalty, (self._counts >> 1).float()
        if penalty != 1:
            of_seen = torch.where(values < 0, values * penalty, values / penalty)
            values = torch.where(self._counts > 0, of_seen, values)
        return values - (settings.frequency_penalty * times + settings.presence_penalty * (times > 0))


def _read(token: Tensor, *more: Tensor) -> Coming:
    """Begin to copy a token to the host, and the logit it came from, its logarithm and those of the likeliest."""
    with on_device(token.device):
        there = [_on_its_way(one) for one in (token, *more)]
        done = torch.cuda.Event() if token.is_cuda else None
        if done is not None:
            done.record()

    def chosen() -> Chosen:
        if done is not None:
            done.synchronize()
        first, *others = [one.flatten().tolist() for one in there]
        if others and not math.isfinite(others[0][0]):
            raise UnsupportedModelError(NOT_FINITE)
        if len(others) < 2:
            return Chosen(first[0])
        _, own, tokens, logprobs = others
        return Chosen(first[0], own[0], tuple(zip(tokens, logprobs, strict=True)))

    return chosen


def _on_its_way(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    # Only what is pinned is copied while the host goes on.
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
