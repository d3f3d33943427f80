"""A server on this machine with a tiny model, in a thread, and OpenAI's own client."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from openai import OpenAI

from countdown.engine.engine import Engine
from countdown.server.app import Settings, make_app
from tiny import byte_tokenizer, llama

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'wrong' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Server:
    """A running server."""

    def __init__(self, model: Any = None, *, settings: Settings | None = None, **how: Any) -> None:
        self.tokenizer = byte_tokenizer()
        self.tokenizer.chat_template = TEMPLATE
        self.model = model or llama()
        self.engine = Engine(self.model, self.tokenizer, **{"sequences": 4, **how})
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        app = make_app(self.engine, settings or Settings(model="tiny"))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=30))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)

    def client(self, **more: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **more})

    def stop(self) -> None:
        """What SIGTERM does."""
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.005)
