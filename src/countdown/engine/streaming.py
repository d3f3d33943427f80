"""Text from tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What an incomplete character decodes to.
INCOMPLETE = "�"


class TextStream:
    """Hands on text as it becomes certain.

    Args:
        tokenizer: Of the tokens.
        stop: Strings before which the text ends.
        include_stop: Or behind which.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._tokenizer, self._include_stop = tokenizer, include_stop
        self._stop = [string for string in stop if string]
        self._tokens: list[int] = []
        # Text depends on a few tokens before it: [_begin, _read) was decoded before and is decoded again.
        self._begin = self._read = 0
        self._held = ""  # it may be the beginning of a stop string
        self.stopped: str | None = None  # the stop string that was found

    def add(self, token: int) -> str:
        """Return the text that is certain once this token is there; nothing after a stop string."""
        self._tokens.append(token)
        return self._certain(self._decoded(whole=False))

    def end(self) -> str:
        """Return what is left, once no token follows."""
        text = self._certain(self._decoded(whole=True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _decoded(self, *, whole: bool) -> str:
        """Return text that was not returned before; of characters that are not complete only if `whole`."""
        before = self._text(self._begin, self._read)
        text = self._text(self._begin, len(self._tokens))
        if len(text) <= len(before) or (text.endswith(INCOMPLETE) and not whole):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _text(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True))

    def _certain(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = min(((place, string) for string in self._stop if (place := text.find(string)) >= 0), default=None)
        if found is not None:
            self._held, self.stopped = "", found[1]
            return text[: found[0] + (len(found[1]) if self._include_stop else 0)]
        held = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, string: str) -> int:
    """Return how many characters at the end of a text are the beginning of a string."""
    most = min(len(text), len(string) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(string[:n])), 0)
