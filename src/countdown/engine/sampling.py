"""How the next token is chosen from logits: greedily, or drawn from what temperature, top-k, top-p and min-p leave.

In numpy: it computes on the calling thread alone, where torch would wake threads that then take the cores of the decode
loop's, and a few small operations cost less.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countdown.errors import ConfigError, UnsupportedModelError

Logits = NDArray[np.float32]
Tokens = NDArray[np.int64]

# What a checkpoint's generation config says of sampling, under the same names.
_OF_CHECKPOINTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Others that it may say, with the value that changes nothing.
_UNHEEDED = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
MOST_LOGPROBS = 20
_COLDEST = 1e-5
_ROW = 256
# For the logarithm of a probability that is 0: JSON has no infinities.
NEVER = -9999.0
NOT_FINITE = "the model's logits are not finite (NaN or infinite), so there is no next token."


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
            ("repetition_penalty", 0.01, 100.0),
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
        if 0 < self.temperature < _COLDEST:
            raise ConfigError(f"temperature is {self.temperature}, expected 0 or at least {_COLDEST}.")

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
        # What transformers does where they are not given.
        missing: dict[str, Any] = {"temperature": 1.0, "top_k": 50}
        return replace(found, **{name: value for name, value in missing.items() if given[name] is None})

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
        seed = sampling.seed
        # Seeds of generators are not negative.
        self._generator = np.random.default_rng(None if seed is None else seed % 2**64)

    def choose(self, logits: Tensor) -> Chosen:
        """Return the next token.

        Args:
            logits: Float `[vocabulary]`; left as they are.

        Raises:
            UnsupportedModelError: The largest is not finite: the model computes NaN, or what its dtype does not hold.
        """
        values = as_array(logits)
        if not np.isfinite(values.max()):
            raise UnsupportedModelError(NOT_FINITE)
        adjusted = self._penalised(values) if self.sampling.penalises else values
        token = self._drawn(adjusted) if self.sampling.temperature > 0 else int(adjusted.argmax())
        self._written[token] += 1
        if self.sampling.logprobs is None:
            return Chosen(token)
        shifted = values - values.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        top = _largest(logprobs, self.sampling.logprobs)
        pairs = tuple((int(one), max(float(logprobs[one]), NEVER)) for one in top)
        return Chosen(token, max(float(logprobs[token]), NEVER), pairs)

    def _penalised(self, logits: Logits) -> Logits:
        """Return logits with what prompt and answer have made less likely."""
        logits, settings = logits.copy(), self.sampling
        if settings.repetition_penalty != 1:
            seen = np.fromiter(self._prompt | set(self._written), np.int64)
            of_seen, penalty = logits[seen], np.float32(settings.repetition_penalty)
            logits[seen] = np.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
        if self._written and (settings.frequency_penalty or settings.presence_penalty):
            counts = np.fromiter(self._written.values(), np.float32)
            logits[np.fromiter(self._written, np.int64)] -= (
                settings.frequency_penalty * counts + settings.presence_penalty
            )
        return logits

    def _drawn(self, logits: Logits) -> int:
        """Return a token drawn from what the settings leave."""
        tokens, probabilities = remaining(logits, self.sampling)
        place = place_of(probabilities, self._generator.random())
        return place if tokens is None else int(tokens[place])


def unheeded_in_sampling(generation_config: Any) -> list[str]:
    """Return which settings of a checkpoint that samples change what it draws from, and are not heeded here."""
    if not getattr(generation_config, "do_sample", False):
        return []
    found = {name: getattr(generation_config, name, None) for name in _UNHEEDED}
    return [name for name, value in found.items() if value is not None and value != _UNHEEDED[name]]


def as_array(logits: Tensor) -> Logits:
    """Return logits as float32, exactly, computed on this thread alone."""
    logits = logits.detach().cpu().contiguous()
    if logits.dtype != torch.bfloat16:
        return logits.numpy().astype(np.float32)
    # The leading half of a float32.
    return (logits.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)


def remaining(logits: Logits, sampling: Sampling) -> tuple[Tokens | None, Logits]:
    """Return the tokens that temperature, top-k, top-p and min-p leave, and their probabilities up to a factor.

    Args:
        logits: `[vocabulary]`.
        sampling: How; its temperature is above 0.

    Returns:
        `[n]`, None for all in order; and `[n]`.
    """
    tokens: Tokens | None = None
    logits = logits - logits.max()
    logits /= np.float32(sampling.temperature)
    if 0 < sampling.top_k < len(logits):
        tokens = _largest(logits, sampling.top_k)
        logits = logits[tokens]
    probabilities = np.exp(logits)
    if sampling.top_p < 1:
        places = _likeliest(probabilities, sampling.top_p)
        tokens, probabilities = places if tokens is None else tokens[places], probabilities[places]
    if sampling.min_p > 0:
        probabilities = np.where(probabilities >= sampling.min_p * probabilities.max(), probabilities, np.float32(0))
    return tokens, probabilities


def _likeliest(probabilities: Logits, top_p: float) -> Tokens:
    """Return the places of the fewest that together have a share of the whole, the largest first."""
    whole = float(probabilities.sum(dtype=np.float64))
    # What is less likely than its share of the rest is of the rest: few are left to sort.
    there = np.flatnonzero(probabilities > (1 - top_p) * whole / len(probabilities))
    if not len(there):  # all are as likely
        there = np.array([probabilities.argmax()])
    ordered = there[np.argsort(-probabilities[there], kind="stable")]
    before = probabilities[ordered].cumsum(dtype=np.float64) - probabilities[ordered]
    return ordered[: max(1, int(np.count_nonzero(before < top_p * whole)))]


def place_of(probabilities: Logits, share: float) -> int:
    """Return at which place their sum from the first on passes a share of the whole."""
    whole_rows = len(probabilities) // _ROW * _ROW
    rows = np.append(probabilities[:whole_rows].reshape(-1, _ROW).sum(axis=1), probabilities[whole_rows:].sum())
    row, rest = _passing(rows, share * rows.sum(dtype=np.float64))
    # Only that row is added up one by one.
    return row * _ROW + _passing(probabilities[row * _ROW : (row + 1) * _ROW], rest)[0]


def _passing(values: Logits, wanted: float) -> tuple[int, float]:
    """Return at which place the sum of the values from the first on passes what is wanted, and what that one is to add.

    However it is rounded, a value of 0 is at no such place.
    """
    reached = values.cumsum(dtype=np.float64)
    wanted = min(wanted, float(np.nextafter(reached[-1], 0)))
    place = int(np.searchsorted(reached, wanted, side="right"))
    return place, wanted - (float(reached[place - 1]) if place else 0.0)


def _largest(values: Logits, count: int) -> Tokens:
    """Return the places of so many of the largest, the largest first."""
    return torch.from_numpy(values).topk(min(count, len(values))).indices.numpy()
