"""A chat with a model: turns, and how they become a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from countdown.engine.engine import Answer, Engine, Request
from countdown.engine.sampling import Sampling
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import foreign

Message = dict[str, str]


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of messages in the tokenizer's chat template, up to where the answer begins.

    Args:
        tokenizer: It has a chat template.
        messages: Each a `role` (system, user, assistant) and a `content`.

    Raises:
        UnsupportedModelError: The template fails.
    """
    with foreign("the tokenizer's chat template fails", "Leave it out (--raw), or mend it."):
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


@dataclass(frozen=True)
class Turn:
    """What came of a turn.

    Args:
        answer: The engine's.
        text: What was written.
        dropped: Earlier messages that the context had no room for any more.
        first_s: Seconds to the first token.
        tokens_per_s: Of those after the first, None for fewer than two.
    """

    answer: Answer
    text: str
    dropped: int
    first_s: float
    tokens_per_s: float | None


@dataclass
class Conversation:
    """Turns of a chat, which an engine continues.

    Args:
        engine: Its tokenizer has a chat template.
        sampling: How tokens are chosen.
        system: What the system message says; none if empty.
        max_new_tokens: Of an answer, at most.
        messages: The turns so far, without the system's.

    Raises:
        UnsupportedModelError: The tokenizer has no chat template.
    """

    engine: Engine
    sampling: Sampling
    system: str = ""
    max_new_tokens: int = 1024
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the tokenizer."""
        if not self.engine.tokenizer.chat_template:
            raise UnsupportedModelError(
                "the model's tokenizer has no chat template, so it is no model to chat with; use countdown generate."
            )

    def ask(self, text: str, write: Callable[[str], None] = lambda _: None) -> Turn:
        """Say something and return the answer; if it is interrupted, what was written until then stays.

        Args:
            text: What the user says.
            write: Called with each piece of the answer as it comes.

        Raises:
            ConfigError: It is longer than the context. Nothing is remembered then.
            UnsupportedModelError: The chat template fails.
        """
        asked: Message = {"role": "user", "content": text}
        prompt, dropped = self._fitting(asked)
        started = time.perf_counter()
        times: list[float] = []
        pieces: list[str] = []
        request = Request(prompt=prompt, sampling=self.sampling, max_new_tokens=self._room(prompt))
        answer = self.engine.start(request)
        try:
            while answer.finish is None:
                pieces.append(self.engine.step_of(answer).text)
                times.append(time.perf_counter())
                write(pieces[-1])
        finally:
            self.engine.cancel(answer)
            written = "".join(pieces)
            self.messages = [*self.messages[dropped:], asked, {"role": "assistant", "content": written}]
        steps = len(times) - 1
        rate = steps / (times[-1] - times[0]) if steps > 0 else None
        return Turn(answer, written, dropped, times[0] - started, rate)

    def _fitting(self, asked: Message) -> tuple[list[int], int]:
        """Return the prompt with as many earlier turns as leave room for an answer, and how many messages do not."""
        for dropped in range(0, len(self.messages) + 1, 2):
            prompt = encode_chat(self.engine.tokenizer, [*self._said_first(), *self.messages[dropped:], asked])
            if len(prompt) + self._wanted() <= self.engine.context:
                return prompt, dropped
        if len(prompt) >= self.engine.context:
            raise ConfigError(
                f"this has {len(prompt)} tokens, more than the context of {self.engine.context}: say less."
            )
        return prompt, len(self.messages)

    def _said_first(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _wanted(self) -> int:
        """How much room an answer should have: a quarter of the context, if it may be as long."""
        return min(self.max_new_tokens, self.engine.context // 4)

    def _room(self, prompt: Sequence[int]) -> int:
        return min(self.max_new_tokens, self.engine.context - len(prompt))

    def reset(self) -> None:
        """Forget the turns; what the system says stays."""
        self.messages = []
