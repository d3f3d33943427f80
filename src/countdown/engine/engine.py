"""Prefill and decode for one model: answers token by token, several at a time, in memory that is made once.

An answer runs in a place, which has a decode loop: a static cache and a step that is traced once, for prompt after
prompt. A cache is as long as the texts so far needed, and doubles. What the loop refuses transformers computes, and
this is said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from countdown.decoding import DecodeLoop
from countdown.engine.choosing import Chooser, Coming, chooser
from countdown.engine.handed import Handed
from countdown.engine.sampling import Chosen, Sampling, unheeded_in_sampling
from countdown.engine.streaming import TextStream
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.joint import Joint
from countdown.loading import check_known, context_of
from countdown.modules import sparse_modules
from countdown.sparsify import say_once

MOST_SEQUENCES = 8
# Of more tokens at a time, what a copy in few bits decides takes longer than computing every neuron (measured at 8).
COPIES_UP_TO = 4
# Tokens of the shortest cache, and how many new ones a cache has room for at first.
SHORTEST, AT_FIRST = 1024, 512
# Settings of a checkpoint that change nothing of what is written here, or that `Sampling` heeds.
_HEEDED = {
    "bos_token_id", "cache_implementation", "do_sample", "eos_token_id", "epsilon_cutoff", "eta_cutoff", "max_length",
    "max_new_tokens", "min_p", "pad_token_id", "repetition_penalty", "stop_strings", "temperature", "top_h", "top_k",
    "top_p", "transformers_version", "typical_p", "use_cache", "_commit_hash", "_from_model_config",
}  # fmt: skip
# Of others, the value with which they change nothing.
_NEUTRAL = {
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "min_length": 0,
    "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
}  # fmt: skip
# Of all engines: while a loop is prepared, the model is not as other threads expect it.
TURNS = RLock()
_NEVER = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Args:
        prompt: Token ids.
        sampling: How tokens are chosen.
        max_new_tokens: At most so many; None for as many as fit the context.
        stop: Strings before which the answer ends, besides the checkpoint's own.
        stop_tokens: Tokens with which it ends, besides the model's own.
        ignore_eos: Go on after the model's own.
        include_stop: The text has the stop string that it ended with.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop: bool = False


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer.

    Args:
        token: The token; see `Chosen`.
        text: Text that has become certain: perhaps none, or that of several tokens.
        finish: Why the answer ends with this: `stop` or `length`; None if it goes on.
    """

    token: Chosen
    text: str
    finish: str | None = None


@dataclass
class Answer:
    """An answer that is being written; made by `Engine.start`.

    Args:
        request: What was asked for.
        limit: It has at most so many tokens.
        tokens: Those written so far.
        reused: Tokens of the prompt that the cache held already.
        by: `decode loop` or `transformers`.
        finish: Why it ended: `stop`, `length`, `cancelled` or `error`; None while it goes on.
        error: What went wrong.
    """

    request: Request
    limit: int
    by: str = "decode loop"
    reused: int = 0
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: Exception | None = None


class Engine:
    """Answers requests with a model that is loaded, dense or sparsified.

    For one thread at a time; others wait.

    Args:
        model: A causal language model of transformers, in eval mode. While the engine is open nobody else may change
            it.
        tokenizer: Its tokenizer.
        sequences: How many answers may be written at a time, 1 to 8; each has a cache of its own.
        context: Tokens of prompt and answer together, at most; by default what the model says, or 8192.
        reuse: Begin a prompt with what the cache of the last one in the same place holds of it. Tokens that a sparse
            model generated are read anew, as the prompt that they are now. Sums are then made in another order than
            for a whole prompt, so that a token may differ where two are as likely.
        loop: Whether to use the decode loop; otherwise transformers computes every step.
        sparse_up_to: Answers that share a step are sparse up to so many of them, and dense beyond; None for 4 where a
            copy in few bits decides (`d-proxy`), which for more takes longer than computing all, 8 elsewhere.
            What the reference computes, or a prompt has decided (`griffin`), no answers share; it stays as it is.

    Raises:
        ConfigError: A value out of its range.

    Example:
        engine = countdown.Engine(model, tokenizer)
        for piece in engine.stream(countdown.Request(prompt=ids[0].tolist(), max_new_tokens=64)):
            print(piece.text, end="")
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        sequences: int = 1,
        context: int | None = None,
        reuse: bool = False,
        loop: bool = True,
        sparse_up_to: int | None = None,
    ) -> None:
        if not 1 <= sequences <= MOST_SEQUENCES:
            raise ConfigError(f"sequences is {sequences}, expected 1 to {MOST_SEQUENCES}.")
        if sparse_up_to is not None and not 1 <= sparse_up_to <= MOST_SEQUENCES:
            raise ConfigError(f"sparse_up_to is {sparse_up_to}, expected 1 to {MOST_SEQUENCES}.")
        longest = context_of(model.config)
        if context is not None and not 2 <= context <= (longest or context):
            raise ConfigError(f"context is {context}, expected 2 to the model's {longest}.")
        self.model, self.tokenizer = model, tokenizer
        self.context = context or longest or 8192
        self._reuse = reuse
        # From so many tokens on transformers computes all.
        self._refused_from = _NEVER if loop else 0
        self._places = [_Place(self) for _ in range(sequences)]
        sites = sparse_modules(model)
        self._is_dense = not sites
        copies = any(site.parts for site in sites.values())
        self.sparse_up_to = (COPIES_UP_TO if copies else MOST_SEQUENCES) if sparse_up_to is None else sparse_up_to
        self._joint = Joint(sparse_up_to=self.sparse_up_to)
        self._closed = False
        if loop and (refusal := _unheeded(model)):
            self._hand_on(refusal, 0)
        for name in unheeded_in_sampling(model.generation_config):
            say_once(f"sampling does not heed the checkpoint's {name}.")

    @property
    def free(self) -> int:
        """How many more answers can be started now."""
        return sum(place.answer is None for place in self._places)

    @property
    def answers(self) -> list[Answer]:
        """Those that are being written."""
        return [place.answer for place in self._places if place.answer is not None]

    def check(self, request: Request) -> None:
        """Raise what `start` would, before a place is free.

        Raises:
            ConfigError: See `check_fits`.
        """
        check_fits(self.model, request.prompt, request.max_new_tokens, context=self.context)

    def start(self, request: Request) -> Answer:
        """Begin an answer in a place that is free: its prompt is computed, and no token chosen yet.

        Raises:
            ConfigError: See `check`; or all places are taken, or the engine is closed.
        """
        self.check(request)
        with TURNS:
            if self._closed:
                raise ConfigError("the engine is closed.")
            free = [place for place in self._places if place.answer is None]
            if not free:
                raise ConfigError(f"all {len(self._places)} places of the engine are taken: try again later.")
            # The one whose cache begins as the prompt does.
            place = max(free, key=lambda one: one.shared(request.prompt))
            room = self.context - len(request.prompt)
            answer = Answer(request, min(request.max_new_tokens or room, room))
            place.begin(answer)
            return answer

    def step(self) -> list[tuple[Answer, Piece]]:
        """Add a token to each answer that is being written; one that fails ends, its `error` set.

        They share one step. Where that fails, all that share it end.
        """
        found = []
        with TURNS:
            self._advance_together()
            for place in self._places:
                answer = place.answer
                if answer is None:
                    continue
                try:
                    found.append((answer, place.step()))
                except Exception as error:
                    answer.finish, answer.error = "error", error
        return found

    def _advance_together(self) -> None:
        """Compute the next logits of all answers that one step can serve."""
        joined = [place for place in self._places if place.can_join]
        if len(joined) < 2:
            return
        try:
            self._joint.advance([place.loop for place in joined if place.loop is not None])
        except BaseException as error:
            for place in joined:
                answer = place.answer
                place.abandon()
                if answer is not None:
                    answer.finish, answer.error = "error", error if isinstance(error, Exception) else None
            if not isinstance(error, Exception):
                raise
            return
        for place in joined:
            place.is_ahead = True

    def _forget(self) -> None:
        """Let go of steps that are joined with loops that no place has any more."""
        self._joint.forget([place.loop for place in self._places if place.loop is not None])

    def cancel(self, answer: Answer) -> None:
        """End an answer where it is; what was ended already stays so."""
        with TURNS:
            for place in self._places:
                if place.answer is answer:
                    place.end("cancelled")

    def stream(self, request: Request) -> Iterator[Piece]:
        """Yield the pieces of one answer; whoever stops early ends it.

        Raises:
            ConfigError: See `start`.
        """
        answer = self.start(request)
        try:
            while answer.finish is None:
                yield self.step_of(answer)
        finally:
            self.cancel(answer)

    def step_of(self, answer: Answer) -> Piece:
        """Add a token to one of the answers that are being written, and raise what goes wrong."""
        with TURNS:
            (place,) = [place for place in self._places if place.answer is answer]
            return place.step()

    def close(self) -> None:
        """End all answers and let go of the memory; the model stays as it is."""
        with TURNS:
            for place in self._places:
                place.abandon()
            self._closed = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_on(self, refusal: str, tokens: int) -> None:
        """From now on let transformers compute texts of so many tokens and more."""
        self._refused_from = min(self._refused_from, tokens)
        say_once(f"transformers generates, which is slower: {refusal}")


class _Place:
    """Where one answer is written at a time.

    Args:
        engine: Whose place it is.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.answer: Answer | None = None
        self.loop: DecodeLoop | None = None
        self._handed: Handed | None = None
        self._chooser: Chooser | None = None
        self._coming: deque[Coming] = deque()  # tokens that are chosen, and not read yet
        self.is_ahead = False  # the logits of the next token are there
        self._held: list[int] = []  # tokens in the cache, those of prompts, that another prompt may begin with

    @property
    def can_join(self) -> bool:
        """Whether its next step may be computed together with those of others."""
        alone = self.answer is None or self._handed is not None or self.is_ahead
        return not alone and self._goes_on and self.loop is not None and self.loop.left > 0

    @property
    def _goes_on(self) -> bool:
        """Whether another token is to be chosen now, be it only to have a device busy while one is read."""
        answer, coming = self.answer, len(self._coming)
        if not coming or answer is None:
            return answer is not None
        runs = self._chooser is not None and self._chooser.ahead and self._handed is None
        left = self.is_ahead or (self.loop is not None and self.loop.left > 0)
        # The first token is waited for: nothing is begun before it is out.
        return runs and left and coming < min(2, 1 + len(answer.tokens)) and len(answer.tokens) + coming < answer.limit

    def shared(self, prompt: Sequence[int]) -> int:
        """Return with how many tokens that the cache holds a prompt begins, and has more than those."""
        if not self._engine._reuse or self.loop is None or not self.loop.can_keep:
            return 0
        most = min(len(self._held), len(prompt) - 1)
        return next((n for n in range(most) if self._held[n] != prompt[n]), most)

    def begin(self, answer: Answer) -> None:
        """Compute the prompt of an answer."""
        request, engine = answer.request, self._engine
        prompt = torch.tensor([list(request.prompt)], dtype=torch.int64, device="cpu")
        needed = len(request.prompt) + min(answer.limit, AT_FIRST)
        if needed < engine._refused_from:
            try:
                self._prepare(prompt, answer)
            except UnsupportedModelError as error:
                engine._hand_on(str(error), needed)
            except BaseException:
                self.let_go()  # it stands where nobody knows
                raise
        if needed >= engine._refused_from:
            self._hand(answer)
        self.answer = answer
        self._chooser = chooser(request.sampling, request.prompt, next(engine.model.parameters()).device)
        # Text has no special tokens, so these stop as tokens.
        special = engine.tokenizer.get_added_vocab()
        stop = [*request.stop, *(engine.model.generation_config.stop_strings or ())]  # type: ignore[union-attr, misc]
        self._stream = TextStream(engine.tokenizer, stop, include_stop=request.include_stop)
        own = set() if request.ignore_eos else ends(engine.model)
        self._ends = own | set(request.stop_tokens) | {special[string] for string in stop if string in special}

    def _prepare(self, prompt: Tensor, answer: Answer) -> None:
        length, limit = prompt.shape[1], answer.limit
        needed = length + min(limit, AT_FIRST)
        kept, self._held = self.shared(prompt[0].tolist()), []
        if self.loop is not None and needed <= self.loop.room:
            self.loop.restart(prompt, new_tokens=min(limit, self.loop.room - length), kept=kept)
            self._engine._forget()  # should that have traced its step anew
            answer.reused = kept
        else:
            self.let_go()  # its memory first
            room = min(room_for(needed), self._engine.context)
            self.loop = DecodeLoop(self._engine.model, prompt, new_tokens=min(limit, room - length), room=room)
        self._held = prompt[0].tolist()

    def _hand(self, answer: Answer) -> None:
        """Let transformers write the answer, from its beginning."""
        self.let_go()
        answer.by = "transformers"
        device = next(self._engine.model.parameters()).device
        prompt = torch.tensor([list(answer.request.prompt)], dtype=torch.int64, device=device)
        ends = not answer.request.ignore_eos
        self._handed = Handed(self._engine.model, prompt, new_tokens=answer.limit, ends=ends)
        for token in answer.tokens:
            self._handed.advance()
            self._handed.token.fill_(token)

    def step(self) -> Piece:
        """Choose the next token of the answer."""
        answer = self.answer
        assert answer is not None
        try:
            return self._step(answer)
        except BaseException:
            self.abandon()
            raise

    def _step(self, answer: Answer) -> Piece:
        while self._goes_on:
            self._coming.append(self._choose(answer))
        chosen = self._coming.popleft()()
        answer.tokens.append(chosen.token)
        # The tokens that end an answer are not part of its text.
        ended = chosen.token in self._ends
        text = "" if ended else self._stream.add(chosen.token)
        finish = None
        if ended or self._stream.stopped is not None:
            finish = "stop"
        elif len(answer.tokens) == answer.limit:
            finish = "length"
        if finish is not None:
            text += self._stream.end()
            self.end(finish)
        return Piece(chosen, text, finish)

    def _choose(self, answer: Answer) -> Coming:
        if self._handed is None and self.loop is not None and not self.loop.left and not self.is_ahead:
            self._grow(self.loop, answer)
        steps = self._handed or self.loop
        assert steps is not None
        assert self._chooser is not None
        logits = self.loop.current if self.is_ahead and self.loop is not None else steps.advance()
        self.is_ahead = False
        return self._chooser.choose(logits, steps.token)

    def _grow(self, loop: DecodeLoop, answer: Answer) -> None:
        text = [*answer.request.prompt, *answer.tokens[:-1]]
        room = min(2 * loop.room, self._engine.context)
        left = min(answer.limit - len(answer.tokens), room - len(text))
        try:
            loop.grow(room, torch.tensor([text], dtype=torch.int64, device="cpu"), new_tokens=left)
            self._engine._forget()  # steps that are joined with the one in the shorter cache
        except UnsupportedModelError as error:
            self._engine._hand_on(str(error), loop.room)
            self._hand(answer)

    def abandon(self) -> None:
        """End the answer, if there is one, and let go of the loop, wherever it stands."""
        self.end("cancelled")
        self.let_go()

    def let_go(self) -> None:
        """Give the memory of the loop back."""
        self.loop = None
        self._engine._forget()

    def end(self, why: str) -> None:
        """End the answer, if there is one."""
        if self._handed is not None:
            self._handed.close()
            self._handed = None
        self.is_ahead = False
        self._coming.clear()
        if self.answer is None:
            return
        answer, self.answer = self.answer, None
        answer.finish = why
        if self.loop is not None and self._engine._is_dense:
            # What a dense model generated is what it would compute of a prompt.
            self._held += answer.tokens[:-1]


def check_fits(model: nn.Module, prompt: Sequence[int], new_tokens: int | None, *, context: int | None = None) -> None:
    """Check that a model can read a prompt and answer it.

    Args:
        model: Dense or sparsified.
        prompt: Token ids.
        new_tokens: At most so many, None for any number.
        context: Tokens in all, at most; by default what the model says.

    Raises:
        ConfigError: No prompt, a number below 1, more tokens than the context, or one that the model does not know.
    """
    length, wanted = len(prompt), 1 if new_tokens is None else new_tokens
    if not length:
        raise ConfigError("the prompt has no tokens.")
    if wanted < 1:
        raise ConfigError(f"max_new_tokens is {wanted}, expected at least 1.")
    if min(prompt) < 0:
        raise ConfigError(f"the prompt has token {min(prompt)}, and there is none below 0.")
    check_known(model, [torch.tensor(prompt, device="cpu", dtype=torch.int64)])
    context = context or context_of(model.config)
    if context is None or length + wanted <= context:
        return
    fits = f"shorten it to {context - wanted}" if wanted < context else ""
    fewer = f"ask for {context - length} new ones (max_new_tokens)" if length < context else ""
    raise ConfigError(
        f"the prompt has {length} tokens, which with {wanted} new ones is longer than the model's context of "
        f"{context}: {' or '.join(filter(None, [fits, fewer]))}."
    )


def ends(model: Any) -> set[int]:
    """Return the tokens after which a model has nothing more to say."""
    found = model.generation_config.eos_token_id
    return set(found if isinstance(found, list) else [] if found is None else [found])


def room_for(tokens: int) -> int:
    """Return how many tokens a cache has room for that holds at least so many."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


def _unheeded(model: Any) -> str:
    """Return what the checkpoint asks for that the loop does not heed; nothing if it heeds all."""
    settings = model.generation_config.to_diff_dict()
    for name, value in settings.items():
        neutral = value is None or value is False or value == _NEUTRAL.get(name)
        if name not in _HEEDED and not neutral:
            return f"the decode loop does not heed the checkpoint's {name}."
    return ""
