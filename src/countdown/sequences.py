"""The sequences of a batch, for which a set of terms is chosen once, from their prompt.

A row of the decoder's calls is a sequence. What was chosen for it stands beside its cache, as an attribute of that: so
each sequence has its own, whichever is decoded when and on which thread; a copy of the cache has a copy; and whoever
empties the cache, or takes another, starts anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from countdown.errors import UnsupportedModelError

_NUMBERS = itertools.count(1)
# Of a cache.
_BESIDE = "_countdown_sequences"
# Where a model is handed its cache, or returns one that it made; before transformers 5.24 the second.
NAMES = ("cache", "past_key_values")


class Sets:
    """One set of terms for each sequence, in memory that stays where it is while the sequences do.

    Args:
        shape: How many sequences, and terms.
        device: Where.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        # Made under inference_mode, they could not be renewed outside of it.
        with torch.inference_mode(False):
            self.scores = torch.zeros(shape, dtype=torch.float64, device=device)
            self.active = torch.zeros(shape, dtype=torch.bool, device=device)
        self.prompts = 0  # calls of the decoder that they were chosen from


class Sequences:
    """The sequences of a batch, from where their cache was empty.

    Args:
        count: How many.
        model: The number of the model that computes them; see `numbered`.
    """

    def __init__(self, count: int, model: int) -> None:
        self.count, self.model = count, model
        self.refusal: str | None = None  # why their prompts cannot be known
        self.padding: Tensor | None = None  # which of the present call's tokens are, bool [sequences, tokens]
        self._prompts = 0  # calls with tokens of their prompts
        self._sets: dict[str, Sets] = {}
        self._cache: Any = None  # of the present call
        self._in_call = False
        self._seen: tuple[int, Tensor | None] | None = None  # what the cache held after the last call

    def prompt(self, mask: Any, tokens: int, parts: tuple[Tensor, Tensor] | None) -> None:
        """Take the tokens of the present call as tokens of prompts.

        Args:
            mask: The attention mask that the decoder is given.
            tokens: How many of each sequence.
            parts: Where not all of them are prompt, which are, and which are generated, each bool
                `[sequences * tokens]`.
        """
        self._prompts += 1
        if self.refusal is not None:
            return
        past = 0 if self._cache is None else length_of(self._cache)
        try:
            self.padding = padding(mask, past, (self.count, tokens))
        except ValueError:
            self._refuse(
                "this attention mask does not tell which tokens are padding, and those must not choose a set: give one "
                "of [sequences, tokens]."
            )
        if parts is not None and parts[0].numel() == self.count * tokens:
            self._check_order(*(part.view(self.count, tokens) for part in parts))

    def choose(self, site: str, scores: Tensor, choice: Callable[[Tensor], Tensor]) -> None:
        """Renew the sets of a site, in place, where they are known.

        Args:
            site: Its name.
            scores: What the present call's prompt tokens add to the scores, float64 `[sequences, terms]`.
            choice: Returns sets, bool `[sequences, terms]`, of scores summed over the whole prompt.
        """
        found = self._sets.get(site)
        if found is None or found.scores.shape != scores.shape or found.scores.device != scores.device:
            found = self._sets[site] = Sets(scores.shape, scores.device)
        if self._prompts == 1:
            found.scores.zero_()
        elif found.prompts != self._prompts - 1:  # it was dense meanwhile
            return
        found.prompts = self._prompts
        found.scores.add_(scores)
        found.active.copy_(choice(found.scores))

    def active(self, site: str, device: torch.device) -> Tensor | None:
        """Return the sets of a site, bool `[sequences, terms]`; None unless they were chosen from the whole prompt.

        Raises:
            UnsupportedModelError: What the prompt was cannot be known.
        """
        if self.refusal is not None:
            raise UnsupportedModelError(self.refusal)
        found = self._sets.get(site)
        if found is None or found.prompts == 0 or found.prompts != self._prompts or found.active.device != device:
            return None
        return found.active

    def enter(self, cache: Any, count: int) -> None:
        """Begin a call of so many sequences that go on where the cache ends, from its beginning if it is empty."""
        seen, self._seen = self._seen, None
        self._cache, self._in_call, self.padding = cache, True, None
        if cache is None or length_of(cache) == 0:
            self._prompts, self.refusal = 0, None
        elif count != self.count or (seen and (seen[0] != length_of(cache) or seen[1] is not _state_of(cache))):
            self._refuse(
                "the sequences of a cache were put in another order, multiplied or cut since its last call, as beam "
                "search does: which prompt is whose, and so its set, is not known."
            )

    def leave(self, output: object) -> None:
        """End a call, and stand beside the cache that it was given or returned."""
        if not self._in_call:
            return
        cache, self._cache = self._cache, None
        self._in_call, self.padding = False, None
        if cache is None:
            cache = next((c for c in (getattr(output, name, None) for name in NAMES) if c is not None), None)
        if cache is not None and hasattr(cache, "layers"):
            setattr(cache, _BESIDE, self)
            self._seen = (length_of(cache), _state_of(cache))

    def _check_order(self, prompt: Tensor, generated: Tensor) -> None:
        """Refuse generated tokens before the end of their prompt, both bool `[sequences, tokens]`."""
        early = prompt & (generated.cumsum(dim=1) > 0)
        if self._prompts == 1:
            early = early | (generated & (prompt.cumsum(dim=1) == 0))
        if bool(early.any()):
            self._refuse("a call has generated tokens before the end of their prompt, from which their set is chosen.")

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason


def beside(cache: Any) -> Sequences | None:
    """Return the sequences in a cache, None where their beginning was not seen."""
    found: Sequences | None = getattr(cache, _BESIDE, None)
    return found


def numbered() -> int:
    """Return a number, above 0, for a model whose sequences are followed: another's sets are not its own."""
    return next(_NUMBERS)


def continued(cache: Any, count: int, model: int) -> Sequences | None:
    """Return the so many sequences in a cache, None where this model did not see their beginning; reads no value."""
    found = beside(cache)
    if found is None or (found.count, found.model) != (count, model):
        return None
    if found._seen is not None:
        found._seen = None  # what the cache holds changes unseen
    return found


def in_call(cache: Any, count: int, model: int) -> Sequences:
    """Return the so many sequences of a model's call, which begin where there is no cache or an empty one."""
    found = beside(cache)
    empty = cache is None or length_of(cache) == 0
    if found is None or found.model != model or (empty and found.count != count):
        found = Sequences(count, model)
        if not empty:
            found.refusal = (
                "a cache holds tokens that the sparsified model has not computed, perhaps of a prompt, and a set is "
                "chosen from the whole prompt: begin with an empty cache."
            )
    found.enter(cache, count)
    return found


def length_of(cache: Any) -> int:
    """Return how many tokens of a sequence a cache holds; of one that counts none, 1 if it holds anything."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return int(bool(getattr(cache, "has_previous_state", lambda: True)()))


def _state_of(cache: Any) -> Tensor | None:
    """Return a tensor of the cache that another takes the place of when its sequences change places."""
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else (value,):
                if isinstance(tensor, Tensor):
                    return tensor
    return None


def padding(mask: Any, past: int, shape: tuple[int, int]) -> Tensor | None:
    """Return which new tokens an attention mask hides, bool `[sequences, tokens]`, None for none of them.

    Args:
        mask: What a decoder is given: None, `[sequences, past + tokens]`, or `[sequences or 1, heads or 1, tokens,
            keys]`, true or 0 where a token attends; or a dictionary of such, by kind of layer.
        past: Tokens in the cache.
        shape: How many sequences and tokens.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(mask, dict):
        mask = max(mask.values(), key=lambda one: one.shape[-1] if isinstance(one, Tensor) else -1)
    if mask is None:
        return None
    sequences, tokens = shape
    if not isinstance(mask, Tensor) or mask.shape[-1] < past + tokens or mask.dim() not in (2, 4):
        raise ValueError("unknown")
    if mask.dim() == 2:
        return mask[:, past : past + tokens] == 0
    # A token that is there attends to itself.
    own = mask[:, 0, :, past : past + tokens].diagonal(dim1=-2, dim2=-1)
    hidden = ~own if own.dtype == torch.bool else own != 0
    return hidden.expand(sequences, tokens)
