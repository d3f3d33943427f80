"""Steps of a model by transformers' own `generate`, for models that the decode loop does not run."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import foreign


class Handed:
    """One text, with the interface of a `DecodeLoop`: transformers computes the logits, in a thread of its own.

    Only one of the two threads runs at a time.

    Args:
        model: Dense or sparsified.
        prompt: Token ids `[1, n]`.
        new_tokens: How many may follow.
        ends: The text ends with the model's own token for that.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, *, new_tokens: int, ends: bool = True) -> None:
        self.left = new_tokens
        self.token = torch.zeros((1, 1), dtype=torch.int64, device=prompt.device)
        self._exchange = _Exchange()
        self._first = True
        arguments = (model, prompt, new_tokens, ends, self._exchange)
        self._thread = threading.Thread(target=_generate, args=arguments, daemon=True)

    def advance(self) -> Tensor:
        """See `DecodeLoop.advance`.

        Raises:
            ConfigError: More steps than `new_tokens`.
            UnsupportedModelError: The model's own `generate` fails.
        """
        if not self.left:
            raise ConfigError("1 more tokens do not fit, 0 are left.")
        self.left -= 1
        if self._first:
            self._first = False
            self._thread.start()
        else:
            self._exchange.tokens.put(int(self.token))
        found = self._exchange.logits.get()
        if isinstance(found, Exception):
            raise found
        logits: Tensor = found
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def close(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._exchange.tokens.put(None)
            self._thread.join()


class _Exchange:
    """What the two threads hand each other."""

    def __init__(self) -> None:
        self.logits: queue.Queue[Any] = queue.Queue()
        self.tokens: queue.Queue[int | None] = queue.Queue()


class _Ended(BaseException):
    """Nobody wants another token; passes what catches errors."""


class _Ask(LogitsProcessor):  # type: ignore[misc]
    """Hands on the logits, and leaves only the token that was chosen."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Wait for the token that follows `input_ids`."""
        self._exchange.logits.put(scores.detach().clone())
        token = self._exchange.tokens.get()
        if token is None:
            raise _Ended
        only = torch.full_like(scores, float("-inf"))
        only[0, token] = 0
        return only


def _generate(model: Any, prompt: Tensor, new_tokens: int, ends: bool, exchange: _Exchange) -> None:
    remedy = "If a setting in generation_config.json asks for that, remove it."
    try:
        with foreign(f"{type(model).__name__}.generate fails", remedy):
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                # Whoever takes the tokens says when it ends, and what is counted again. Some processors need to know
                # what would end it.
                max_new_tokens=new_tokens + 1,
                **({} if ends else {"eos_token_id": None}),
                stop_strings=None,
                repetition_penalty=1.0,
                do_sample=False,
                # Without, each call would be a prompt to a sparsified model, and dense.
                use_cache=True,
                num_beams=1,
                num_return_sequences=1,
                temperature=None,
                top_p=None,
                top_k=None,
                min_p=None,
                pad_token_id=0,
                logits_processor=[_Ask(exchange)],
            )
        exchange.logits.put(UnsupportedModelError(f"{type(model).__name__}.generate has ended its text."))
    except _Ended:
        pass
    except Exception as error:  # whatever it is, the thread that waits for logits raises it
        exchange.logits.put(error)
