"""Turns of a chat."""

from __future__ import annotations

import pytest
import torch

from countdown.engine.conversation import Conversation
from countdown.engine.engine import Engine
from countdown.engine.sampling import Sampling
from countdown.errors import ConfigError, UnsupportedModelError
from serving import TEMPLATE
from tiny import byte_tokenizer, llama


@pytest.fixture
def engine():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Engine(llama(), tokenizer, context=120, reuse=True)


def written(engine: Engine, prompt: str, tokens: int) -> str:
    ids = torch.tensor([engine.tokenizer(prompt)["input_ids"]])
    found = engine.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return str(engine.tokenizer.decode(found, skip_special_tokens=True))


def test_each_turn_sees_those_before(engine):
    chat = Conversation(engine, Sampling(), system="be brief", max_new_tokens=6)
    pieces: list[str] = []
    first = chat.ask("hello", pieces.append)
    assert first.text == "".join(pieces) == written(engine, "<system>be brief<user>hello<assistant>", 6)
    second = chat.ask("why")
    prompt = f"<system>be brief<user>hello<assistant>{first.text}<user>why<assistant>"
    assert second.text == written(engine, prompt, 6)
    assert second.answer.reused > 20
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.ask("hello").text == first.text


def test_what_no_longer_fits_is_dropped_from_the_beginning(engine):
    chat = Conversation(engine, Sampling(), max_new_tokens=10)
    dropped = [chat.ask(f"{n}" * 10).dropped for n in range(5)]
    assert dropped[0] == 0
    assert dropped[-1] == 2
    assert chat.messages[0]["content"] != "0000000000"
    assert len(chat.messages) % 2 == 0


def test_what_never_fits_is_refused_and_not_remembered(engine):
    chat = Conversation(engine, Sampling())
    chat.ask("hello")
    with pytest.raises(ConfigError, match="this has 224 tokens, more than the context of 120: say less"):
        chat.ask("x" * 207)
    assert len(chat.messages) == 2
    # An answer of one token is an answer.
    assert len(chat.ask("x" * 102).answer.tokens) == 1


def test_an_answer_that_is_interrupted_stays_as_far_as_it_came(engine):
    chat = Conversation(engine, Sampling(), max_new_tokens=20)
    whole = written(engine, "<user>hello<assistant>", 20)

    def interrupt(piece: str, seen: list[str] = []) -> None:  # noqa: B006  (counts)
        seen.append(piece)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("hello", interrupt)
    assert engine.free == 1
    assert chat.messages[1]["content"]
    assert whole.startswith(chat.messages[1]["content"])
    chat.ask("go on")


def test_without_a_chat_template_there_is_no_chat():
    with pytest.raises(UnsupportedModelError, match=r"no chat template.* use countdown generate"):
        Conversation(Engine(llama(), byte_tokenizer()), Sampling())
