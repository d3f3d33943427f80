"""The engine on a CPU: the tokens of transformers, one answer or several, and what it does with places and memory."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import countdown
import tiny
from countdown import joint
from countdown.engine import choosing
from countdown.engine import engine as module
from countdown.engine.engine import Engine, Request
from countdown.engine.sampling import Sampling
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.methods import method
from countdown.sparsify import say_once
from fused_loop import FusedLoop

PROMPTS = [[5, 17, 90, 3, 250, 64, 31, 8], [9, 1, 2], [200, 201, 202, 203, 5, 5, 5], [44] * 30]


DEVICE = {"is": "cpu"}


def llama(**more: Any) -> nn.Module:
    return tiny.llama(**more).to(DEVICE["is"])


def gemma3(**more: Any) -> nn.Module:
    return tiny.gemma3(**more).to(DEVICE["is"])


def own(model: nn.Module, prompt: list[int], tokens: int, **more: Any) -> list[int]:
    settings = {"do_sample": False, "pad_token_id": 0, **more}
    ids = torch.tensor([prompt], device=DEVICE["is"])
    return model.generate(ids, max_new_tokens=tokens, **settings)[0, len(prompt) :].tolist()


def written(engine: Engine, **request: Any) -> list[int]:
    return [piece.token.token for piece in engine.stream(Request(**request))]


def written_on(engine: Engine, answer: Any) -> None:
    while answer.finish is None:
        engine.step_of(answer)


@pytest.fixture(autouse=True, params=["cpu", "as on a gpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """Where all of this is done. As on a GPU: steps put together, and the next one begins before a token is read."""
    if request.param == "as on a gpu":
        monkeypatch.setattr(choosing, "CHOOSING", {"cpu"})
        monkeypatch.setattr(module, "DecodeLoop", FusedLoop)
    if request.param == "gpu":
        monkeypatch.setitem(DEVICE, "is", "cuda")
        monkeypatch.setattr(joint, "ALONE", 1)


@pytest.fixture
def sparse(tokenizer, text):
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)
    return countdown.sparsify_(model, profile)


@pytest.mark.parametrize("make", [llama, gemma3])
def test_prompt_after_prompt_it_writes_what_generate_writes(make, tokenizer):
    model = make()
    engine = Engine(model, tokenizer)
    for prompt in (*PROMPTS, PROMPTS[0]):
        assert written(engine, prompt=prompt, max_new_tokens=9) == own(model, prompt, 9)


def test_nothing_is_traced_again_for_another_prompt(tokenizer, monkeypatch):
    engine = Engine(llama(), tokenizer)
    written(engine, prompt=PROMPTS[0], max_new_tokens=2)
    monkeypatch.setattr(module, "DecodeLoop", None)
    assert len(written(engine, prompt=PROMPTS[1], max_new_tokens=20)) == 20


def test_several_answers_are_each_what_they_are_alone(sparse, tokenizer):
    expected = [own(sparse, prompt, 7 + place) for place, prompt in enumerate(PROMPTS)]
    engine = Engine(sparse, tokenizer, sequences=3)
    answers = [engine.start(Request(prompt=PROMPTS[0], max_new_tokens=7))]
    engine.step()
    answers += [engine.start(Request(prompt=PROMPTS[n], max_new_tokens=7 + n)) for n in (1, 2)]
    assert engine.free == 0
    with pytest.raises(ConfigError, match="all 3 places of the engine are taken"):
        engine.start(Request(prompt=PROMPTS[3], max_new_tokens=1))
    while answers[0].finish is None:
        engine.step()
    answers.append(engine.start(Request(prompt=PROMPTS[3], max_new_tokens=10)))
    while engine.answers:
        engine.step()
    assert [answer.tokens for answer in answers] == expected
    assert {answer.finish for answer in answers} == {"length"}


def test_a_cache_doubles_and_the_text_goes_on(sparse, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 32)
    monkeypatch.setattr(module, "AT_FIRST", 8)
    expected = own(sparse, PROMPTS[0], 200)
    engine = Engine(sparse, tokenizer, context=250)
    assert written(engine, prompt=PROMPTS[0], max_new_tokens=200) == expected
    assert engine._places[0].loop.room == 250
    # Up to the last token of the context.
    assert written(engine, prompt=PROMPTS[0]) == own(sparse, PROMPTS[0], 242)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_the_beginning_of_a_prompt_is_not_read_again(name, tokenizer, sparse):
    model = llama() if name == "dense" else sparse
    engine = Engine(model, tokenizer, reuse=True, sequences=2)
    first = written(engine, prompt=PROMPTS[0], max_new_tokens=6)
    turn = [*PROMPTS[0], *first, 7, 8, 9]
    answer = engine.start(Request(prompt=turn, max_new_tokens=8))
    # What a sparse model generated is a prompt now, and dense. The last token of an answer was never read.
    assert answer.reused == len(PROMPTS[0]) + (5 if name == "dense" else 0)
    while answer.finish is None:
        engine.step()
    assert answer.tokens == own(model, turn, 8)
    # The same prompt again: its last token is read, as its logits are needed.
    again = engine.start(Request(prompt=turn, max_new_tokens=1))
    assert again.reused == len(turn) - 1


def test_caches_double_while_answers_share_steps(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 16)
    monkeypatch.setattr(module, "AT_FIRST", 4)
    model = llama()
    expected = [own(model, prompt, 20 + place) for place, prompt in enumerate(PROMPTS[:3])]
    engine = Engine(model, tokenizer, sequences=3)
    answers = [engine.start(Request(prompt=p, max_new_tokens=20 + n)) for n, p in enumerate(PROMPTS[:3])]
    while engine.answers:
        engine.step()
        # Nothing is kept of shorter caches.
        kept = [step for group in engine._joint._known.values() for step in group._steps]
        assert all(step in [p.loop._replay for p in engine._places] for step in kept)
    assert [answer.tokens for answer in answers] == expected
    assert {answer.by for answer in answers} == {"decode loop"}


def test_with_a_copy_in_few_bits_few_answers_at_a_time_are_sparse(sparse, tokenizer, text):
    assert Engine(sparse, tokenizer).sparse_up_to == 8
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("d-proxy"), tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    assert Engine(model, tokenizer).sparse_up_to == 4
    assert Engine(model, tokenizer, sparse_up_to=6).sparse_up_to == 6


def test_answers_that_sample_share_steps(tokenizer):
    sampling = [Sampling(temperature=0.8, seed=seed, logprobs=1) for seed in range(3)]
    requests = [Request(prompt=p, max_new_tokens=6, sampling=s) for p, s in zip(PROMPTS, sampling, strict=False)]
    engine = Engine(llama(), tokenizer, sequences=3)
    alone = [written(engine, prompt=r.prompt, max_new_tokens=6, sampling=r.sampling) for r in requests]
    answers = [engine.start(request) for request in requests]
    while engine.answers:
        engine.step()
    assert [answer.tokens for answer in answers] == alone


def test_an_answer_that_ends_leaves_the_others_in_step(tokenizer):
    model = llama()
    engine = Engine(model, tokenizer, sequences=3)
    answers = [engine.start(Request(prompt=prompt, max_new_tokens=9)) for prompt in PROMPTS[:3]]
    for _ in range(4):
        engine.step()
    engine.cancel(answers[1])
    again = engine.start(Request(prompt=PROMPTS[3], max_new_tokens=9))
    while engine.answers:
        engine.step()
    expected = [own(model, PROMPTS[n], 9) for n in (0, 2, 3)]
    assert [answer.tokens for answer in (answers[0], answers[2], again)] == expected
    assert answers[1].tokens == own(model, PROMPTS[1], 9)[:4]


def test_a_step_for_all_that_fails_ends_all_and_frees_their_places(tokenizer, monkeypatch):
    engine = Engine(llama(), tokenizer, sequences=2)
    answers = [engine.start(Request(prompt=prompt, max_new_tokens=4)) for prompt in PROMPTS[:2]]
    monkeypatch.setattr(engine._joint, "advance", lambda loops: 1 / 0)
    assert engine.step() == []
    assert [(answer.finish, type(answer.error)) for answer in answers] == [("error", ZeroDivisionError)] * 2
    assert engine.free == 2
    monkeypatch.undo()
    assert written(engine, prompt=PROMPTS[0], max_new_tokens=4) == own(engine.model, PROMPTS[0], 4)


def test_an_interrupted_step_leaves_no_place_half_way(tokenizer, monkeypatch):
    engine = Engine(llama(), tokenizer, sequences=2)
    answers = [engine.start(Request(prompt=prompt, max_new_tokens=4)) for prompt in PROMPTS[:2]]

    def interrupted(loops: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._joint, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [answer.finish for answer in answers] == ["error"] * 2
    assert engine.free == 2
    monkeypatch.undo()
    assert written(engine, prompt=PROMPTS[1], max_new_tokens=4) == own(engine.model, PROMPTS[1], 4)


def test_a_loop_that_is_let_go_of_is_not_kept_by_those_it_shared_steps_with(tokenizer):
    engine = Engine(llama(), tokenizer, sequences=2)
    for prompt in PROMPTS[:2]:
        engine.start(Request(prompt=prompt, max_new_tokens=6))
    engine.step()
    engine.step()
    cache = weakref.ref(engine._places[0].loop.cache.layers[0].keys)
    assert engine._joint._known
    engine._places[0].abandon()
    gc.collect()
    assert cache() is None


def test_without_reuse_nothing_is_kept(tokenizer):
    engine = Engine(llama(), tokenizer)
    written(engine, prompt=PROMPTS[0], max_new_tokens=3)
    assert engine.start(Request(prompt=PROMPTS[0], max_new_tokens=3)).reused == 0


def test_an_answer_ends_with_the_models_own_token_or_those_asked_for(tokenizer):
    model = llama()
    expected = own(model, PROMPTS[0], 12)
    engine = Engine(model, tokenizer)
    ended = list(engine.stream(Request(prompt=PROMPTS[0], max_new_tokens=12, stop_tokens=[expected[4]])))
    first = expected.index(expected[4])
    assert [piece.token.token for piece in ended] == expected[: first + 1]
    assert ended[-1].finish == "stop"
    model.generation_config.eos_token_id = [expected[4], 255]
    assert written(engine, prompt=PROMPTS[0], max_new_tokens=12) == expected[: first + 1]
    assert written(engine, prompt=PROMPTS[0], max_new_tokens=12, ignore_eos=True) == expected


def test_an_answer_ends_before_a_stop_string(tokenizer):
    model = llama()
    text = tokenizer.decode(own(model, PROMPTS[0], 12))
    stop = text[3:5]
    pieces = list(Engine(model, tokenizer).stream(Request(prompt=PROMPTS[0], max_new_tokens=12, stop=[stop])))
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert pieces[-1].finish == "stop"


def test_sampling_repeats_with_a_seed_and_differs_without(tokenizer):
    engine = Engine(llama(), tokenizer, sequences=2)
    drawn = [
        written(engine, prompt=PROMPTS[0], max_new_tokens=20, sampling=Sampling(temperature=3.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != own(engine.model, PROMPTS[0], 20)


def test_logprobs_are_of_the_token_that_was_chosen(tokenizer):
    model = llama()
    pieces = list(
        Engine(model, tokenizer).stream(Request(prompt=PROMPTS[1], max_new_tokens=4, sampling=Sampling(logprobs=2)))
    )
    tokens = [piece.token.token for piece in pieces]
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[1] + tokens], device=DEVICE["is"])
        logprobs = model(ids).logits.cpu()[0, len(PROMPTS[1]) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([p.token.logprob for p in pieces]), expected, atol=1e-3, rtol=1e-3)
    assert [piece.token.top[0][0] for piece in pieces] == tokens


def test_whoever_stops_early_frees_the_place(tokenizer):
    engine = Engine(llama(), tokenizer)
    for _ in engine.stream(Request(prompt=PROMPTS[0])):
        break
    assert engine.free == 1
    answer = engine.start(Request(prompt=PROMPTS[0]))
    engine.step()
    engine.cancel(answer)
    assert (answer.finish, len(answer.tokens), engine.free) == ("cancelled", 1, 1)
    assert written(engine, prompt=PROMPTS[1], max_new_tokens=5) == own(engine.model, PROMPTS[1], 5)


def test_a_closed_engine_gives_its_memory_back_and_the_model_as_it_was(tokenizer):
    model = llama()
    before = own(model, PROMPTS[0], 5)
    with Engine(model, tokenizer) as engine:
        answer = engine.start(Request(prompt=PROMPTS[0]))
        engine.step()
        keys = weakref.ref(engine._places[0].loop.cache.layers[0].keys)
    gc.collect()
    assert keys() is None
    assert answer.finish == "cancelled"
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.start(Request(prompt=PROMPTS[0]))
    assert own(model, PROMPTS[0], 5) == before


def refusing(monkeypatch, message: str = "not this one") -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedModelError(message)

    monkeypatch.setattr(module, "DecodeLoop", refuse)


def test_what_the_loop_refuses_transformers_writes_and_that_is_said(sparse, tokenizer, monkeypatch, caplog):
    expected = [own(sparse, prompt, 8) for prompt in PROMPTS[:2]]
    refusing(monkeypatch)
    say_once.cache_clear()
    engine = Engine(sparse, tokenizer, sequences=2)
    answers = [engine.start(Request(prompt=prompt, max_new_tokens=8)) for prompt in PROMPTS[:2]]
    while engine.answers:
        engine.step()
    assert [answer.tokens for answer in answers] == expected
    assert {answer.by for answer in answers} == {"transformers"}
    assert [record.message for record in caplog.records] == ["transformers generates, which is slower: not this one"]


def test_transformers_samples_and_stops_as_the_loop_does(tokenizer, monkeypatch):
    model = llama()
    request = {"prompt": PROMPTS[0], "max_new_tokens": 15, "sampling": Sampling(temperature=2.0, seed=7)}
    expected = written(Engine(model, tokenizer), **request)
    refusing(monkeypatch)
    engine = Engine(model, tokenizer)
    assert written(engine, **request) == expected
    threads = threading.active_count()
    answer = engine.start(Request(**request))
    engine.step()
    engine.cancel(answer)
    assert threading.active_count() == threads
    model.generation_config.eos_token_id = expected[2]
    assert len(written(engine, **request)) == expected.index(expected[2]) + 1


def test_a_text_that_outgrows_the_loop_goes_on_in_transformers(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 16)
    monkeypatch.setattr(module, "AT_FIRST", 8)
    model = llama()
    expected = own(model, PROMPTS[0], 40)

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedModelError("it turns otherwise at 16")

    monkeypatch.setattr(module.DecodeLoop, "grow", refuse)
    engine = Engine(model, tokenizer)
    answer = engine.start(Request(prompt=PROMPTS[0], max_new_tokens=40))
    while answer.finish is None:
        engine.step()
    assert (answer.tokens, answer.by) == (expected, "transformers")
    # Shorter ones still run in the loop.
    assert engine.start(Request(prompt=PROMPTS[1], max_new_tokens=4)).by == "decode loop"


def test_settings_of_a_checkpoint_that_nothing_heeds_go_to_transformers(tokenizer, caplog):
    model = llama()
    model.generation_config.no_repeat_ngram_size = 2
    say_once.cache_clear()
    engine = Engine(model, tokenizer)
    assert written(engine, prompt=PROMPTS[0], max_new_tokens=12) == own(model, PROMPTS[0], 12)
    assert "does not heed the checkpoint's no_repeat_ngram_size" in caplog.text


def test_one_answer_that_fails_leaves_the_others_alone(tokenizer):
    engine = Engine(llama(), tokenizer, sequences=2)
    answers = [engine.start(Request(prompt=prompt, max_new_tokens=4)) for prompt in PROMPTS[:2]]
    engine._places[0]._stream.add = lambda _: 1 / 0
    while engine.answers:
        engine.step()
    assert (answers[0].finish, type(answers[0].error)) == ("error", ZeroDivisionError)
    assert answers[1].tokens == own(engine.model, PROMPTS[1], 4)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [5, 999]}, "the text has token 999, but the model knows 257"),
        ({"prompt": [5, -1]}, "the prompt has token -1, and there is none below 0"),
        ({"prompt": [5], "max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"prompt": [5] * 40, "max_new_tokens": 30}, r"40 tokens, which with 30 new ones is longer than the "
         r"model's context of 64: shorten it to 34 or ask for 24 new ones \(max_new_tokens\)"),
        ({"prompt": [5] * 64}, "64 tokens, which with 1 new ones is longer than the model's context of 64: shorten it"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_answered_are_refused(request_, message, tokenizer):
    engine = Engine(llama(), tokenizer, context=64)
    with pytest.raises(ConfigError, match=message):
        engine.start(Request(**request_))
    assert engine.free == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequences": 9}, "sequences is 9, expected 1 to 8"),
        ({"sparse_up_to": 9}, "sparse_up_to is 9, expected 1 to 8"),
        ({"sparse_up_to": 0}, "sparse_up_to is 0, expected 1 to 8"),
        ({"context": 1}, "context is 1, expected 2 to"),
        ({"context": 10**9}, "context is 1000000000, expected 2 to the model's"),
    ],
)
def test_engines_that_cannot_be_made_are_refused(settings, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        Engine(llama(), tokenizer, **settings)


def test_stop_strings_of_a_checkpoint_stop(tokenizer):
    model = llama()
    text = tokenizer.decode(own(model, PROMPTS[0], 12))
    model.generation_config.stop_strings = [text[3:5]]
    for include, end in ((False, text.index(text[3:5])), (True, text.index(text[3:5]) + 2)):
        request = Request(prompt=PROMPTS[0], max_new_tokens=12, include_stop=include)
        assert "".join(piece.text for piece in Engine(model, tokenizer).stream(request)) == text[:end]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=type)
def test_a_failure_while_a_cache_grows_leaves_no_loop_behind(error, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 32)
    monkeypatch.setattr(module, "AT_FIRST", 8)
    engine = Engine(llama(), tokenizer)
    answer = engine.start(Request(prompt=PROMPTS[0], max_new_tokens=60))

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module.DecodeLoop, "_prepare_steps", fail)
        with pytest.raises(type(error)):
            written_on(engine, answer)
    assert written(engine, prompt=PROMPTS[1], max_new_tokens=40) == own(engine.model, PROMPTS[1], 40)


def test_memory_that_runs_out_once_is_no_reason_to_be_slow_for_good(tokenizer, monkeypatch):
    engine = Engine(llama(), tokenizer)

    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(module.DecodeLoop, "_start", fail)
        with pytest.raises(RuntimeError, match="allocate memory"):
            engine.start(Request(prompt=PROMPTS[0]))
    assert engine.start(Request(prompt=PROMPTS[0])).by == "decode loop"


def test_what_a_checkpoint_asks_of_the_end_holds_in_transformers(tokenizer):
    model = llama()
    end = own(model, PROMPTS[0], 6)[3]
    model.generation_config.eos_token_id, model.generation_config.min_new_tokens = end, 10
    expected = own(model, PROMPTS[0], 24)
    assert len(expected) >= 10
    assert written(Engine(model, tokenizer), prompt=PROMPTS[0], max_new_tokens=24) == expected


def test_a_stop_string_may_be_a_special_token(tokenizer):
    model = llama()
    always = torch.tensor([256], device=DEVICE["is"])
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, always, 1e3))
    assert own(model, PROMPTS[0], 4) == [256] * 4
    engine = Engine(model, tokenizer)
    assert written(engine, prompt=PROMPTS[0], max_new_tokens=4) == [256] * 4
    assert written(engine, prompt=PROMPTS[0], max_new_tokens=4, stop=["<bos>"]) == [256]
    model.generation_config.stop_strings = ["<bos>"]
    assert written(engine, prompt=PROMPTS[0], max_new_tokens=4) == [256]
