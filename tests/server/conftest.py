"""A server for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from serving import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def client(server: Server) -> OpenAI:
    return server.client()
