"""OpenAI's requests and answers, as far as one model on one machine has what they ask for.

Of what the API defines, `n` above 1, tools, response formats, `logit_bias`, `echo`, `suffix` and `best_of` are refused;
`top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `stop_token_ids` are taken besides, as other servers do. Fields
that nobody knows are ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from countdown.engine.conversation import encode_chat
from countdown.engine.engine import Piece, Request
from countdown.engine.sampling import MOST_LOGPROBS, Sampling
from countdown.engine.streaming import INCOMPLETE
from countdown.errors import ConfigError, UnsupportedModelError, told
from countdown.text import is_text

MOST_STOPS = 16
# New tokens of a completion where nothing is said, as OpenAI's.
FEW = 16
# Fields that change an answer and are not served, with the values that change nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logit_bias": ({},), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
}  # fmt: skip
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed",
)  # fmt: skip
_WHOLE = ("top_k", "seed")


class ApiError(Exception):
    """An error in OpenAI's form.

    Args:
        message: One line, for whoever sent the request.
        status: Of HTTP.
        kind: `type` in OpenAI's form.
        code: `code`, None where it has none.
        param: The field that is wrong.
    """

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error", code: str | None = None,
        param: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request for an answer, understood.

    Args:
        request: For the engine.
        chat: Whether it is of a chat, not a completion.
        stream: Whether to send pieces as they come.
        include_usage: Whether to end them with how many tokens there were.
        model: The model's name.
    """

    request: Request
    chat: bool
    stream: bool
    include_usage: bool
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))


def understood(body: Any, *, chat: bool, model: str, tokenizer: Any, defaults: Sampling) -> Asked:
    """Return what a request asks for.

    Args:
        body: What was sent, parsed.
        chat: Whether it was sent to `/v1/chat/completions`.
        model: The name of the model that is served.
        tokenizer: Its tokenizer.
        defaults: How tokens are chosen where the request does not say.

    Raises:
        ApiError: It is not a request, or asks for what is not served.
    """
    if not isinstance(body, dict):
        raise ApiError("the body is not a JSON object.")
    if (asked := body.get("model")) not in (None, model):
        raise ApiError(
            f"the model {asked!r} does not exist; this server has {model!r}.",
            status=404, code="model_not_found", param="model",
        )  # fmt: skip
    for name, neutral in _REFUSED.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise ApiError(f"{name} is not supported by this server.", param=name)
    prompt = _chat_prompt(body, tokenizer) if chat else _prompt(body, tokenizer)
    stops, options = _stops(body), body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError("stream_options is not an object.", param="stream_options")
    request = Request(
        prompt=prompt,
        sampling=_sampling(body, defaults, chat=chat),
        max_new_tokens=_most_tokens(body, chat=chat),
        stop=stops,
        stop_tokens=_token_ids(body.get("stop_token_ids") or [], "stop_token_ids"),
        ignore_eos=_flag(body, "ignore_eos"),
    )
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    usage = _flag(options or {}, "include_usage")
    return Asked(request, chat, _flag(body, "stream"), usage, model, name)


def _chat_prompt(body: dict[str, Any], tokenizer: Any) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages is missing, or not a list of messages.", param="messages")
    if not tokenizer.chat_template:
        raise ApiError("the model has no chat template; use /v1/completions.", param="messages")
    chat = [_message(message, place) for place, message in enumerate(messages)]
    try:
        return encode_chat(tokenizer, chat)
    except UnsupportedModelError as error:
        reason = told(error.__cause__ or error)
        raise ApiError(f"the model's chat template refuses these messages: {reason}.", param="messages") from error


def _message(message: Any, place: int) -> dict[str, str]:
    name = f"messages[{place}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(f"{name} is not an object with a role.", param=name)
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise ApiError(f"{name} has content that is not text; this server takes text alone.", param=name)
        content = "".join(parts)  # type: ignore[arg-type]
    if not isinstance(content, str) or not is_text(content):
        raise ApiError(f"the content of {name} is not text.", param=name)
    return {"role": message["role"], "content": content}


def _prompt(body: dict[str, Any], tokenizer: Any) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str) and is_text(prompt):
        return list(tokenizer(prompt)["input_ids"])
    if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
        raise ApiError("this server takes one prompt in a request.", param="prompt")
    if isinstance(prompt, list):
        return _token_ids(prompt, "prompt")
    raise ApiError("prompt is missing, or neither text nor a list of tokens.", param="prompt")


def _token_ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**31 for one in value):
        raise ApiError(f"{name} is not a list of token ids.", param=name)
    return value


def _sampling(body: dict[str, Any], defaults: Sampling, *, chat: bool) -> Sampling:
    given = {name: _number(body, name, whole=name in _WHOLE) for name in _SAMPLING}
    if given["top_k"] == -1:  # as other servers say all
        given["top_k"] = 0
    given["logprobs"] = _logprobs(body, chat=chat)
    for name, value in given.items():
        try:
            defaults = defaults.with_(**{name: value})
        except ConfigError as error:
            raise ApiError(str(error), param=name) from error
    return defaults


def _logprobs(body: dict[str, Any], *, chat: bool) -> int | None:
    if not chat:
        return _number(body, "logprobs", whole=True)  # type: ignore[return-value]
    top = _number(body, "top_logprobs", whole=True)
    if top is not None and not _flag(body, "logprobs"):
        raise ApiError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if top is not None and not 0 <= top <= MOST_LOGPROBS:
        raise ApiError(f"top_logprobs is {top}, expected 0 to {MOST_LOGPROBS}.", param="top_logprobs")
    return int(top or 0) if _flag(body, "logprobs") else None


def _most_tokens(body: dict[str, Any], *, chat: bool) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        found = _number(body, name, whole=True)
        if found is None:
            continue
        if found < 1:
            raise ApiError(f"{name} is {found}, expected at least 1.", param=name)
        return int(found)
    return None if chat else FEW


def _stops(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise ApiError("stop is neither a string nor a list of strings, none of them empty.", param="stop")
    if len(stops) > MOST_STOPS:
        raise ApiError(f"stop has {len(stops)} strings, expected at most {MOST_STOPS}.", param="stop")
    return stops


def _number(body: dict[str, Any], name: str, *, whole: bool) -> float | None:
    value = body.get(name)
    kinds = (int,) if whole else (int, float)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
        raise ApiError(f"{name} is not a{' whole' if whole else ''} number.", param=name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(f"{name} is neither true nor false.", param=name)
    return bool(value)


class Reply:
    """Makes OpenAI's answers from the pieces of one.

    Args:
        asked: What was asked for.
        tokenizer: Names tokens where probabilities are asked for.
    """

    def __init__(self, asked: Asked, tokenizer: Any) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._offset = 0  # of the text, in completions

    def whole(self, pieces: Sequence[Piece], reused: int) -> dict[str, Any]:
        """Return the answer in one."""
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs(pieces)
        finish = pieces[-1].finish
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"text": text}
        return self._object("", [choice]) | {"usage": self.usage(len(pieces), reused)}

    def begin(self) -> list[dict[str, Any]]:
        """Return what comes before the first piece: of a chat, who speaks."""
        if not self._asked.chat:
            return []
        return [self._chunk({"role": "assistant", "content": ""}, None, None)]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """Return what a piece adds, nothing where no text has become certain and nothing ends."""
        logprobs = self._logprobs([piece])
        if not self._asked.chat:
            skip = not piece.text and piece.finish is None and logprobs is None
            return [] if skip else [self._chunk(piece.text, logprobs, piece.finish)]
        found = []
        if piece.text or logprobs is not None:
            found.append(self._chunk({"content": piece.text}, logprobs, None))
        if piece.finish is not None:
            found.append(self._chunk({}, None, piece.finish))
        return found

    def end(self, tokens: int, reused: int) -> list[dict[str, Any]]:
        """Return what comes after the last piece."""
        if not self._asked.include_usage:
            return []
        return [self._object(".chunk", []) | {"usage": self.usage(tokens, reused)}]

    def usage(self, tokens: int, reused: int) -> dict[str, Any]:
        """Return how many tokens there were."""
        prompt = len(self._asked.request.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _chunk(self, content: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": logprobs, "finish_reason": finish}
        choice |= {"delta": content} if self._asked.chat else {"text": content}
        return self._object(".chunk", [choice])

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._asked.chat else "text_completion"
        about = {"id": self._asked.id, "object": kind, "created": self._asked.created, "model": self._asked.model}
        return about | {"choices": choices}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self._asked.request.sampling.logprobs is None:
            return None
        if self._asked.chat:
            return {"content": [self._token(piece) for piece in pieces], "refusal": None}
        offsets = []
        for piece in pieces:
            offsets.append(self._offset)
            self._offset += len(piece.text)
        return {
            "tokens": [self._name(piece.token.token) for piece in pieces],
            "token_logprobs": [piece.token.logprob for piece in pieces],
            # Parts of characters have the same name: the likeliest comes last and stays.
            "top_logprobs": [{self._name(token): x for token, x in reversed(piece.token.top)} for piece in pieces],
            "text_offset": offsets,
        }

    def _token(self, piece: Piece) -> dict[str, Any]:
        top = [self._named(token, value) for token, value in piece.token.top]
        return self._named(piece.token.token, piece.token.logprob) | {"top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self._name(token)
        # Part of a character has no text of its own.
        return {"token": name, "logprob": logprob, "bytes": None if INCOMPLETE in name else list(name.encode())}

    def _name(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
