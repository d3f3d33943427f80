"""The server against OpenAI's own client, and against those who mean it no good."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import countdown
from countdown.engine.engine import Request
from countdown.methods import method
from countdown.server.app import Settings
from serving import Server, until
from tiny import llama

HELLO = [{"role": "user", "content": "hello"}]


def expected(server: Server, prompt: str, tokens: int) -> str:
    """What the model writes greedily by itself."""
    ids = torch.tensor([server.tokenizer(prompt)["input_ids"]])
    written = server.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return str(server.tokenizer.decode(written, skip_special_tokens=True))


def posted(server: Server, path: str = "chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", content=json.dumps(body), timeout=60)


def test_a_chat_is_answered_as_the_model_writes(server, client):
    found = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, temperature=0)
    (choice,) = found.choices
    assert choice.message.content == expected(server, "<user>hello<assistant>", 12)
    assert (choice.message.role, choice.finish_reason, found.model) == ("assistant", "length", "tiny")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (22, 12, 34)


def test_a_streamed_chat_is_the_same_in_pieces(server, client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(server, "<user>hello<assistant>", 12)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 12)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_of_text_or_tokens(stream, server, client):
    for prompt in ("hello", ["hello"], server.tokenizer("hello")["input_ids"]):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, temperature=0, stream=stream)
        text = "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text
        assert text == expected(server, "hello", 9)
    # As OpenAI's, where nothing is said.
    assert client.completions.create(model="tiny", prompt="hello").usage.completion_tokens == 16


def test_content_in_parts_and_several_turns(server, client):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
    assert found.choices[0].message.content == expected(server, "<system>be brief<user>hello<assistant>", 5)


def test_stop_strings_and_tokens_end_an_answer(server, client):
    text = expected(server, "<user>hello<assistant>", 12)
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    found = client.chat.completions.create(**ask, stop=[text[4:6]])
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (text[: text.index(text[4:6])], "stop")
    ids = server.tokenizer(text)["input_ids"]
    found = client.chat.completions.create(**ask, extra_body={"stop_token_ids": [ids[0]]})
    assert (found.choices[0].message.content, found.usage.completion_tokens) == ("", 1)


def test_logprobs(server, client):
    ask = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    chat = client.chat.completions.create(**ask, messages=HELLO, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    assert all(one.logprob == one.top_logprobs[0].logprob and len(one.top_logprobs) == 3 for one in content)
    completion = client.completions.create(**ask, prompt="hello", logprobs=2)
    found = completion.choices[0].logprobs
    assert len(found.tokens) == len(found.text_offset) == 4
    assert all(
        max(top.values()) == logprob for top, logprob in zip(found.top_logprobs, found.token_logprobs, strict=True)
    )
    streamed = list(client.chat.completions.create(**ask, messages=HELLO, logprobs=True, stream=True))
    again = [one for chunk in streamed if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.token for one in again] == [one.token for one in content]


def test_a_seed_repeats_an_answer(client):
    def text(seed: int) -> str:
        found = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, temperature=2, seed=seed)
        return str(found.choices[0].message.content)

    assert text(1) == text(1) != text(2)


def test_the_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
        client.models.retrieve("other")


def test_many_at_once_are_each_answered_as_alone(server):
    prompts = [f"{n} times {n * 7}" for n in range(12)]
    alone = [expected(server, prompt, 10 + n) for n, prompt in enumerate(prompts)]

    def ask(n: int) -> str:
        stream = server.client().completions.create(
            model="tiny", prompt=prompts[n], max_tokens=10 + n, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_a_sparse_model_is_served_sparse_and_says_how_sparse(tokenizer, text):
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)
    server = Server(countdown.sparsify_(model, profile))
    try:
        found = server.client().completions.create(model="tiny", prompt="hello", max_tokens=30, temperature=0)
        assert found.choices[0].text == expected(server, "hello", 30)
        assert 0.3 < metrics(server)["countdown_realised_sparsity"] < 0.7
    finally:
        server.stop()


def metrics(server: Server) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {sample.name + "".join(sample.labels.get("outcome", "")): sample.value for sample in samples}


def test_what_prometheus_reads(server, client):
    before = metrics(server)
    client.completions.create(model="tiny", prompt="hello", max_tokens=7)
    after = metrics(server)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("countdown_prompt_tokens_total") == 5
    assert more("countdown_generated_tokens_total") == 7
    assert more("countdown_time_to_first_token_seconds_count") == 1
    assert more("countdown_tokens_per_second_count") == 1
    assert more("countdown_requests_totallength") == 1
    assert (after["countdown_running"], after["countdown_waiting"]) == (0, 0)
    assert "countdown_realised_sparsity" not in after


def test_health(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": "hello"}, "messages is missing, or not a list", "messages"),
    ({"messages": []}, "messages is missing, or not a list", "messages"),
    ({"messages": ["hello"]}, r"messages\[0\] is not an object with a role", "messages[0]"),
    ({"messages": [{"role": "user"}]}, r"the content of messages\[0\] is not text", "messages[0]"),
    ({"messages": [{"role": "user", "content": "\udcff"}]}, r"the content of messages\[0\] is not text", "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "takes text alone", "messages[0]"),
    (
        {"messages": [{"role": "wrong", "content": "x"}]},
        "chat template refuses these messages: .*no such role",
        "messages",
    ),
    ({"temperature": -1}, "temperature is -1, expected 0", "temperature"),
    ({"temperature": "hot"}, "temperature is not a number", "temperature"),
    ({"temperature": True}, "temperature is not a number", "temperature"),
    ({"temperature": 10**400}, "temperature is", "temperature"),
    ({"top_p": 0}, "top_p is 0, expected above 0", "top_p"),
    ({"max_tokens": 0}, "max_tokens is 0, expected at least 1", "max_tokens"),
    ({"max_tokens": -5}, "max_tokens is -5, expected at least 1", "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens is not a whole number", "max_tokens"),
    ({"max_tokens": 10**30}, "longer than the model's context", "messages"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "longer than the model's context", "messages"),
    ({"n": 2}, "n is not supported", "n"),
    ({"tools": [{"type": "function"}]}, "tools is not supported", "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias is not supported", "logit_bias"),
    ({"stop": ""}, "none of them empty", "stop"),
    ({"stop": 0}, "stop is neither a string nor a list", "stop"),
    ({"temperature": 1e-40}, "temperature is 1e-40, expected 0 or at least", "temperature"),
    ({"stop": 5}, "stop is neither a string nor a list", "stop"),
    ({"stop": ["x"] * 17}, "stop has 17 strings, expected at most 16", "stop"),
    ({"top_logprobs": 3}, "top_logprobs needs logprobs", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21, expected 0 to 20", "top_logprobs"),
    ({"logprobs": 1}, "logprobs is neither true nor false", "logprobs"),
    ({"seed": 0.5}, "seed is not a whole number", "seed"),
    ({"stream": "yes"}, "stream is neither true nor false", "stream"),
    ({"stream_options": 3}, "stream_options is not an object", "stream_options"),
    ({"model": "gpt-5"}, "the model 'gpt-5' does not exist; this server has 'tiny'", "model"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids is not a list of token ids", "stop_token_ids"),
]


@pytest.mark.parametrize(("change", "message", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_request_is_told_what_is_wrong(change, message, param, server):
    found = posted(server, **{"messages": HELLO, **change})
    error = found.json()["error"]
    assert found.status_code == (404 if param == "model" else 400), error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(message, error["message"]), error["message"]
    assert "\n" not in error["message"]
    test_health(server)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": ["a", "b"]}, "one prompt in a request"),
        ({"prompt": [5, 300]}, "has token 300, but the model knows 257"),
        ({"prompt": [-1]}, "prompt is not a list of token ids"),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"echo": True}, "echo is not supported"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"logprobs": 21}, "logprobs is 21, expected 0 to 20"),
    ],
)
def test_a_wrong_completion_is_told_what_is_wrong(change, message, server):
    found = posted(server, "completions", **{"prompt": "hello", **change})
    assert found.status_code == 400
    assert message in found.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"[1]", b'"text"', b'{"messages": NaN}', b"\xff\xfe", b'{"a":' + b"[" * 200_000, b"9" * 10_000],
    ids=lambda body: body[:12].decode("latin-1"),
)
def test_what_is_no_json_object_is_refused(body, server):
    found = httpx.post(f"{server.url}/v1/chat/completions", content=body)
    assert found.status_code == 400
    assert "not JSON" in found.json()["error"]["message"] or "not a JSON object" in found.json()["error"]["message"]


def test_fields_that_nobody_knows_are_ignored(server):
    more = {"user": "me", "metadata": {}, "surprise": 1, "model": None, "stop": None, "top_p": 1e-9, "top_k": 1}
    assert posted(server, messages=HELLO, max_tokens=1, **more).status_code == 200


def test_paths_and_verbs_that_do_not_exist(server):
    for path, verb, status in (("/v1/nothing", "GET", 404), ("/v1/chat/completions", "GET", 405)):
        found = httpx.request(verb, server.url + path)
        assert (found.status_code, found.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_body_that_is_too_long_is_read_no_further(server):
    long = b'{"messages": [' + b" " * (5 << 20)
    found = httpx.post(f"{server.url}/v1/chat/completions", content=long)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")
    with socket.create_connection(server.listener.getsockname()) as connection:
        # Its length is not declared: it comes in chunks, until nobody reads them.
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(OSError):
            for _ in range(100):
                connection.sendall(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
        with suppress(OSError):
            assert b" 413 " in connection.recv(64)
    test_health(server)


def test_a_key_is_asked_for():
    server = Server(settings=Settings(model="tiny", api_key="sécret"))
    try:
        for key in ("", "wrong"):
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                server.client(api_key=key or "x").models.list()
        headers = {"Authorization": "Bearer sécret".encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert posted(server, messages=HELLO).status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        server.stop()


def test_those_who_find_no_place_wait_and_those_beyond_are_refused():
    server = Server(sequences=1, settings=Settings(model="tiny", most_waiting=1))
    try:
        long = {"model": "tiny", "prompt": "hello", "max_tokens": 1500, "stream": True}
        first = server.client().completions.create(**long)
        next(iter(first))
        second = server.client().completions.create(**long)
        until(lambda: metrics(server)["countdown_waiting"] == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already"):
            server.client().completions.create(**long)
        first.close()  # its place is free for the second
        assert next(iter(second)).choices
        second.close()
        until(lambda: server.engine.free == 1)
        assert metrics(server)["countdown_requests_totalcancelled"] == 2
    finally:
        server.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream, server):
    body = json.dumps({"prompt": "hello", "max_tokens": 1900, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.sendall(head + body)
        until(lambda: server.engine.free == 3)
    until(lambda: server.engine.free == 4)


def test_a_client_that_leaves_in_its_own_body_takes_no_place(server):
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    test_health(server)
    assert server.engine.free == 4


def test_a_client_that_reads_slowly_gets_all_and_holds_up_nobody(server):
    body = json.dumps({"prompt": "hello", "max_tokens": 300, "stream": True, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(head.encode() + body)
        connection.recv(64)
        assert posted(server, messages=HELLO, max_tokens=5).status_code == 200
        read = b""
        while part := connection.recv(4096):
            read += part
    assert b"[DONE]" in read


def test_when_it_stops_who_is_connected_is_answered_and_nobody_else():
    server = Server()
    stream = server.client().completions.create(
        model="tiny", prompt="hello", max_tokens=400, stream=True, temperature=0
    )
    pieces = [next(iter(stream)).choices[0].text]
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    pieces += [chunk.choices[0].text for chunk in stream]
    stopping.join(60)
    assert "".join(pieces) == expected(server, "hello", 400)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    with pytest.raises(countdown.ConfigError, match="closed"):
        server.engine.start(Request(prompt=[1]))


def test_an_error_in_the_middle_of_a_stream_is_said_and_the_server_lives(server, monkeypatch):
    step = server.engine.step
    calls = iter(range(100))

    def failing() -> Any:
        if next(calls) == 3:
            for answer in server.engine.answers:
                place = next(place for place in server.engine._places if place.answer is answer)
                place.loop.advance = lambda: 1 / 0
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "step", failing)
        lines = posted(server, "completions", prompt="hello", max_tokens=50, stream=True).text.splitlines()
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in last["error"]["message"]
    for place in server.engine._places:
        place.loop = None
    assert posted(server, messages=HELLO, max_tokens=3).status_code == 200


def test_where_the_engines_thread_ends_nobody_waits_for_ever(monkeypatch):
    server = Server()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(server.engine, "step", lambda: sys.exit(3))
            patch.setattr(threading, "excepthook", lambda _: None)
            assert posted(server, messages=HELLO).status_code == 500
        assert posted(server, messages=HELLO).status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
    finally:
        server.stop()


def test_a_model_that_computes_nan_is_the_servers_fault():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    server = Server(model)
    try:
        found = posted(server, messages=HELLO, logprobs=True, temperature=0)
        assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
        assert "not finite" in found.json()["error"]["message"]
    finally:
        server.stop()
