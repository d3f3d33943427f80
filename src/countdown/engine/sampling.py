"""How the next token is chosen from logits: greedily, or drawn from what temperature, top-k, top-p and min-p leave."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from countdown.errors import ConfigError

# What a checkpoint's generation config says of sampling, under the same names.
_OF_CHECKPOINTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
MOST_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The order is transformers': penalties, temperature, top-k, top-p, min-p.

    Args:
        temperature: What logits are divided by; 0 takes the likeliest token, and nothing is drawn.
        top_k: Only so many of the likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together have this probability.
        min_p: Only tokens that have this share of the likeliest one's probability.
        repetition_penalty: What the logit of a token that prompt or answer has is divided by, or multiplied with if it
            is negative (CTRL, arXiv 1909.05858); 1 for none.
        frequency_penalty: Taken from a logit for each time that the answer has the token.
        presence_penalty: Taken once if the answer has the token.
        seed: Of the generator that draws; None for another each time.
        logprobs: Report the logarithms of the probabilities, before any of the above, of the token and of so many of
            the likeliest; None reports none.

    Raises:
        ConfigError: A value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31),
            ("min_p", 0.0, 1.0),
            ("frequency_penalty", -2.0, 2.0),
            ("presence_penalty", -2.0, 2.0),
            ("logprobs", 0, MOST_LOGPROBS),
            ("seed", -(2**63), 2**64 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} is {value}, expected {low} to {high}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, expected above 0, at most 1.")
        if not 0 < self.repetition_penalty <= 100:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}, expected above 0, at most 100.")

    @property
    def is_plain(self) -> bool:
        """Whether the token is the one with the largest logit, and nothing else is asked for."""
        return self.temperature == 0 and self.logprobs is None and not self.penalises

    @property
    def penalises(self) -> bool:
        """Whether what is there already counts."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @classmethod
    def of(cls, generation_config: Any) -> Sampling:
        """Return what a checkpoint's generation config asks for: greedy decoding, where it says nothing of sampling."""
        given = {name: getattr(generation_config, name, None) for name in _OF_CHECKPOINTS}
        found = cls(**{name: value for name, value in given.items() if value is not None})
        if not getattr(generation_config, "do_sample", False):
            return replace(cls(), repetition_penalty=found.repetition_penalty)
        return replace(found, temperature=found.temperature if given["temperature"] is not None else 1.0)

    def with_(self, **changes: Any) -> Sampling:
        """Return a copy with these settings; those that are None stay.

        Raises:
            ConfigError: A value out of its range, or no such setting.
        """
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"sampling has no setting {name!r}, only: {', '.join(names)}.")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Chosen:
    """A token, and what was asked for of its probability.

    Args:
        token: Its id.
        logprob: The logarithm of its probability, None unless asked for.
        top: The likeliest tokens with theirs, the likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: How.
        prompt: Its tokens, which a repetition penalty counts, too.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self.sampling = sampling
        self._prompt = set(prompt)
        self._written: Counter[int] = Counter()
        self._generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> Chosen:
        """Return the next token.

        Args:
            logits: Float `[vocabulary]`; left as they are.

        Raises:
            ConfigError: They are not numbers: the model computes NaN.
        """
        values = logits.float()
        adjusted = self._penalised(values) if self.sampling.penalises else values
        token = int(self._drawn(adjusted)) if self.sampling.temperature > 0 else int(adjusted.argmax())
        self._written[token] += 1
        if self.sampling.logprobs is None:
            return Chosen(token)
        logprobs = values.log_softmax(-1)
        top = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), pairs)

    def _penalised(self, logits: Tensor) -> Tensor:
        """Return logits with what prompt and answer have made less likely."""
        logits = logits.clone()
        settings = self.sampling
        if settings.repetition_penalty != 1:
            seen = _index(self._prompt | set(self._written), logits)
            of_seen, penalty = logits[seen], settings.repetition_penalty
            logits[seen] = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
        if self._written and (settings.frequency_penalty or settings.presence_penalty):
            written = _index(self._written, logits)
            counts = logits.new_tensor(list(self._written.values()))
            logits[written] -= settings.frequency_penalty * counts + settings.presence_penalty
        return logits

    def _drawn(self, logits: Tensor) -> Tensor:
        """Return a token drawn from what the settings leave, int64 `[]`."""
        tokens, probabilities = remaining(logits, self.sampling)
        at = torch.rand((), dtype=torch.float64, device=logits.device, generator=self._on(logits.device))
        reached = probabilities.double().cumsum(0)
        if not bool(reached[-1] > 0):
            raise ConfigError("the model's logits are not numbers (NaN), so no token can be drawn.")
        place = torch.searchsorted(reached, at * reached[-1], right=True).clamp(max=len(reached) - 1)
        return place if tokens is None else tokens[place]

    def _on(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        return self._generator


def remaining(logits: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """Return the tokens that temperature, top-k, top-p and min-p leave, and their probabilities up to a factor.

    Args:
        logits: Float32 `[vocabulary]`.
        sampling: How.

    Returns:
        int64 `[n]`, None for all in order; float32 `[n]`.
    """
    tokens, logits = None, logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits, tokens = logits.topk(sampling.top_k)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        tokens, probabilities = _likeliest(tokens, probabilities, sampling.top_p)
    if sampling.min_p > 0:
        there = probabilities >= sampling.min_p * probabilities.max()
        probabilities = torch.where(there, probabilities, 0)
    return tokens, probabilities


def _likeliest(tokens: Tensor | None, probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the fewest of the likeliest tokens that together have a probability, the likeliest first."""
    # What is less likely than its share of the rest is of the rest: few tokens are left to sort.
    there = torch.nonzero(probabilities > (1 - top_p) / len(probabilities)).flatten()
    ordered, order = probabilities[there].sort(descending=True, stable=True)
    before = ordered.double().cumsum(0) - ordered
    count = max(1, int((before < top_p).sum()))
    kept = there[order[:count]]
    return (kept if tokens is None else tokens[kept]), ordered[:count]


def _index(tokens: Any, like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)
