"""What is chosen where the logits are, held to what the host chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from countdown.engine import choosing
from countdown.engine.choosing import OnDevice, OnHost, chooser
from countdown.engine.engine import Engine, Request
from countdown.engine.sampling import Chosen, Sampling
from countdown.errors import UnsupportedModelError
from tiny import llama

VOCABULARY = 301
PROMPT = [3, 8, 8, 100]


def logits_of(step: int) -> torch.Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(step)) * 2


def chosen(make: Callable[..., Any], steps: int, **settings: Any) -> list[Chosen]:
    one, found = make(Sampling(**settings), PROMPT), []
    for step in range(steps):
        # Few different ones, so that what was chosen comes up again.
        logits = logits_of(step % 3)
        token = logits.argmax(-1, keepdim=True)
        found.append(one.choose(logits, token)())
        assert int(token) == found[-1].token
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
        {"frequency_penalty": 0.8, "presence_penalty": 0.5},
        {"repetition_penalty": 1.2, "frequency_penalty": -0.3, "presence_penalty": 1.0},
        {"temperature": 0.9, "top_k": 1, "repetition_penalty": 1.3},
        {"temperature": 0.9, "top_p": 1e-6, "presence_penalty": 1.5},
    ],
    ids=str,
)
def test_the_likeliest_token_is_the_hosts(settings):
    assert chosen(OnDevice, 24, **settings) == chosen(OnHost, 24, **settings)


def test_logprobs_are_the_hosts():
    settings = {"temperature": 1.0, "top_k": 1, "repetition_penalty": 1.5, "logprobs": 5}
    for one, other in zip(chosen(OnDevice, 6, **settings), chosen(OnHost, 6, **settings), strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top])


def test_what_cannot_be_has_a_logarithm_all_the_same():
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    found = OnDevice(Sampling(logprobs=2), [0]).choose(logits, torch.zeros(1, 1, dtype=torch.int64))()
    assert (found.token, found.logprob, found.top[1][1]) == (0, 0.0, -9999.0)


def test_tokens_are_drawn_from_what_is_left():
    logits = logits_of(0)
    left = set(logits[0].topk(5).indices.tolist())
    one, token = OnDevice(Sampling(temperature=3.0, top_k=5, seed=1), []), torch.zeros(1, 1, dtype=torch.int64)
    assert {one.choose(logits, token)().token for _ in range(200)} == left


def test_a_seed_repeats_an_answer_and_none_does_not():
    def tokens(seed: int | None) -> list[int]:
        return [one.token for one in chosen(OnDevice, 12, temperature=5.0, seed=seed)]

    assert tokens(1) == tokens(1)
    assert tokens(-1) == tokens(-1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"repetition_penalty": 1.1}, {"logprobs": 1}], ids=str)
def test_logits_that_are_not_finite_are_no_answer(settings, wrong):
    logits = logits_of(0)
    logits[0, 9] = wrong
    coming = OnDevice(Sampling(**settings), PROMPT).choose(logits, logits.argmax(-1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="not finite"):
        coming()


def test_a_gpu_chooses_itself_and_a_cpu_leaves_it_to_the_host():
    assert isinstance(chooser(Sampling(), [], torch.device("cuda")), OnDevice)
    assert isinstance(chooser(Sampling(), [], torch.device("cpu")), OnHost)


def test_a_step_is_under_way_while_a_token_is_read_but_the_first_is_out_before_it_begins(tokenizer, monkeypatch):
    monkeypatch.setattr(choosing, "CHOOSING", {"cpu"})
    engine = Engine(llama(), tokenizer)
    answer = engine.start(Request(prompt=PROMPT, max_new_tokens=4))
    loop = engine._places[0].loop
    left = []
    while answer.finish is None:
        engine.step_of(answer)
        left.append(loop.left)
    # Of four tokens the first came with the prompt, and the last needs none after it.
    assert left == [3, 1, 0, 0]
