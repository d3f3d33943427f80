"""The routes: OpenAI's, /health and /metrics."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from countdown.engine.engine import Engine
from countdown.engine.sampling import Sampling
from countdown.errors import ConfigError, CountdownError, told
from countdown.memory import ran_out
from countdown.server.metrics import Metrics
from countdown.server.protocol import ApiError, Asked, Reply, understood
from countdown.server.worker import DrainingError, Job, QueueFullError, Worker

MOST_BYTES = 4 << 20
NO_ANSWER = 499  # as proxies log a client that has gone; nobody receives it


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Args:
        model: The name that it serves its model by.
        api_key: What clients must send; None for nothing.
        most_waiting: So many requests may wait for a place.
        most_bytes: A body may have so many.
        sampling: How tokens are chosen where a request does not say.
    """

    model: str
    api_key: str | None = None
    most_waiting: int = 64
    most_bytes: int = MOST_BYTES
    sampling: Sampling = Sampling(temperature=1.0)  # noqa: RUF009  (frozen)


def make_app(engine: Engine, settings: Settings) -> Starlette:
    """Return the application; it owns the engine from now on, and closes it when it shuts down."""
    server = _Server(engine, settings)
    return Starlette(
        routes=[
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.one_model),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.complete, methods=["POST"]),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unforeseen},
        lifespan=server.lifespan,
    )


class _Server:
    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._metrics = Metrics(engine.model)
        self._worker = Worker(engine, most_waiting=settings.most_waiting, observer=self._metrics)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        # Whoever was connected has been answered, or has been cut off.
        await asyncio.to_thread(self._worker.close, timeout=1.0)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        self._check_key(request)
        if (name := request.path_params["name"]) != self._settings.model:
            raise ApiError(f"the model {name!r} does not exist.", status=404, code="model_not_found", param="model")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        about = {"id": self._settings.model, "object": "model", "created": 0, "owned_by": "countdown"}
        return about | {"max_model_len": self._engine.context}

    async def health(self, _: Request) -> Response:
        healthy = self._worker.healthy
        return JSONResponse({"status": "ok" if healthy else "unavailable"}, status_code=200 if healthy else 503)

    async def metrics(self, _: Request) -> Response:
        shown = await asyncio.to_thread(self._metrics.shown, self._worker)
        return Response(shown, media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        self._check_key(request)
        body = _parsed(await self._body(request))
        # A template or a long text takes time, in which others are served.
        asked = await asyncio.to_thread(
            understood, body, chat=chat, model=self._settings.model, tokenizer=self._engine.tokenizer,
            defaults=self._settings.sampling,
        )  # fmt: skip
        job = self._submitted(asked)
        reply = Reply(asked, self._engine.tokenizer)
        if asked.stream:
            return _Events(self._events(job, reply), job, self._worker)
        return await self._whole(request, job, reply)

    def _submitted(self, asked: Asked) -> Job:
        try:
            return self._worker.submit(asked.request)
        except ConfigError as error:
            length = len(asked.request.prompt) + (asked.request.max_new_tokens or 1)
            code = "context_length_exceeded" if length > self._engine.context else None
            raise ApiError(str(error), code=code, param="messages" if asked.chat else "prompt") from error
        except QueueFullError as error:
            raise ApiError(str(error), status=429, kind="rate_limit_error", code="queue_full") from error
        except DrainingError as error:
            raise ApiError(str(error), status=503, kind="server_error", code="shutting_down") from error

    async def _whole(self, request: Request, job: Job, reply: Reply) -> Response:
        """Wait for the whole answer, unless the client goes first."""
        collecting = asyncio.create_task(self._collected(job))
        leaving = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=NO_ANSWER)
            assert job.answer is not None or collecting.exception() is not None
            return JSONResponse(reply.whole(collecting.result(), job.answer.reused if job.answer else 0))
        except Exception as error:
            raise _as_api_error(error) from error
        finally:
            self._worker.cancel(job)
            for task in (collecting, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _collected(self, job: Job) -> list[Any]:
        return [piece async for piece in self._worker.pieces(job)]

    async def _events(self, job: Job, reply: Reply) -> AsyncIterator[bytes]:
        count = 0
        try:
            async for piece in self._worker.pieces(job):
                for chunk in reply.begin() if not count else []:
                    yield _event(chunk)
                count += 1
                for chunk in reply.piece(piece):
                    yield _event(chunk)
            for chunk in reply.end(count, job.answer.reused if job.answer else 0):
                yield _event(chunk)
            yield b"data: [DONE]\n\n"
        except Exception as error:
            # The status has been sent; what is left is to say it.
            yield _event(_as_api_error(error).body())

    async def _body(self, request: Request) -> bytes:
        """Return the body, read no further than it may be long."""
        most, parts, size = self._settings.most_bytes, [], 0
        too_long = ApiError(f"the body has more than {most} bytes.", status=413, code="body_too_large")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > most:
            raise too_long
        try:
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_long
                parts.append(part)
        except ClientDisconnect as error:
            raise ApiError("the client has gone.", status=NO_ANSWER) from error
        return b"".join(parts)

    def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        # Headers are bytes, which starlette gives as Latin-1.
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if key is not None and not secrets.compare_digest(given, key.encode()):
            raise ApiError(
                "the API key is missing or wrong; send it as a bearer token.",
                status=401, code="invalid_api_key",
            )  # fmt: skip


class _Events(StreamingResponse):
    """Server-sent events; whoever leaves, at whatever moment, frees the place."""

    def __init__(self, events: AsyncIterator[bytes], job: Job, worker: Worker) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job, self._worker = job, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._worker.cancel(self._job)


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {told(error)}.") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _as_api_error(error: Exception) -> ApiError:
    """Return what is said of an error: what countdown refuses in its words, of others only that they happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):
        return ApiError(str(error))
    if isinstance(error, CountdownError):
        return ApiError(str(error), status=500, kind="server_error")
    if ran_out(error):
        return ApiError("the server's memory ran out.", status=503, kind="server_error", code="out_of_memory")
    return ApiError(f"the server failed: {told(error)}.", status=500, kind="server_error")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Connection": "close"} if error.status == 413 else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ApiError(str(error.detail).lower() + ".", status=error.status_code)
    return JSONResponse(found.body(), status_code=error.status_code, headers=error.headers)


async def _unforeseen(_: Request, error: Exception) -> Response:
    found = _as_api_error(error)
    return JSONResponse(found.body(), status_code=found.status)
