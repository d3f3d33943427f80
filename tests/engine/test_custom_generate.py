"""`model.generate(custom_generate=countdown.decode_loop)` writes what `model.generate()` writes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import countdown
from countdown.engine import custom_generate as module
from countdown.errors import ConfigError
from countdown.methods import method
from countdown.sparsify import say_once
from tiny import gemma3, llama

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def both(model: Any, ids: torch.Tensor = IDS, **settings: Any) -> list[torch.Tensor]:
    found = []
    for more in ({}, {"custom_generate": countdown.decode_loop}):
        torch.manual_seed(3)
        found.append(model.generate(ids, **{**GREEDY, **settings, **more}))
    return found


SETTINGS = [
    {},
    {"do_sample": True, "temperature": 1.5, "top_k": 30},
    {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 5, "eos_token_id": 40},
    {"max_new_tokens": 1},
    {"suppress_tokens": [40, 41]},
]


@pytest.mark.parametrize("make", [llama, gemma3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_writes_what_generate_writes(make, settings, caplog):
    assert torch.equal(*both(make(), **settings))
    assert not caplog.records


def test_it_ends_with_the_models_own_token():
    model = llama()
    end = int(both(model)[0][0, -4])
    first, second = both(model, eos_token_id=end)
    assert torch.equal(first, second)
    assert int(first[0, -1]) == end


def test_the_step_is_traced_once_for_all_prompts_and_again_where_the_model_changes(tokenizer, text, monkeypatch):
    model = llama()
    dense = both(model)[0]
    profile = countdown.calibrate(model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)
    made = []
    monkeypatch.setattr(module, "DecodeLoop", lambda *args, **more: made.append(args) or loop(*args, **more))
    assert torch.equal(*both(model, IDS[:, :5]))
    assert not made
    countdown.sparsify_(model, profile)
    sparse = both(model)
    assert torch.equal(*sparse)
    assert not torch.equal(sparse[0], dense)
    assert len(made) == 1
    countdown.restore_(model)
    assert torch.equal(both(model)[1], dense)
    assert len(made) == 2
    # Longer than what there is room for.
    assert torch.equal(*both(model, max_new_tokens=1100))
    assert len(made) == 3


loop = module.DecodeLoop


def test_weights_that_change_in_place_or_are_replaced_change_the_text():
    model = llama()
    before = both(model)[1]
    with torch.no_grad():
        model.lm_head.weight.neg_()
    changed = both(model)
    assert torch.equal(*changed)
    assert not torch.equal(changed[1], before)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    assert torch.equal(both(model)[1], before)


def test_a_hook_that_is_put_on_a_module_changes_the_text():
    model = llama()
    before = both(model)[1]
    hook = model.model.layers[1].register_forward_hook(lambda _, __, output: -output)
    changed = both(model)
    assert torch.equal(*changed)
    assert not torch.equal(changed[1], before)
    hook.remove()
    assert torch.equal(both(model)[1], before)


def test_tokens_are_streamed_as_they_come():
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Kept()
    decoding = partial(countdown.decode_loop, streamer=streamer)
    found = llama().generate(IDS, **GREEDY, custom_generate=decoding)
    assert (streamer.tokens, streamer.ended) == (found[0].tolist(), True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ids": IDS.repeat(2, 1)}, "takes one sequence, and there are 2"),
    ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])}, "the prompt is padded"),
    ({"return_dict_in_generate": True}, "gives tokens alone"),
    ({"position_ids": torch.arange(8)[None] * 3}, "takes text alone, and there is position_ids"),
    ({"max_new_tokens": 3000}, "longer than the model's context"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_loop_does_not_do_transformers_does_and_that_is_said(settings, reason, caplog):
    say_once.cache_clear()
    first, second = both(llama(), **settings)
    sequences = [getattr(one, "sequences", one) for one in (first, second)]
    assert torch.equal(*sequences)
    assert reason in caplog.text


def test_a_cache_that_holds_something_is_gone_on_from_by_transformers(caplog):
    say_once.cache_clear()
    model, found = llama(), []
    for more in ({}, {"custom_generate": countdown.decode_loop}):
        with torch.no_grad():
            cache = model(IDS[:, :4]).past_key_values
        found.append(model.generate(IDS, **GREEDY, cache=cache, **more))
    assert torch.equal(*found)
    assert "a cache was given" in caplog.text


def test_a_model_is_copied_saved_and_freed_without_its_loop(tmp_path):
    model = llama()
    both(model)
    copied = copy.deepcopy(model)
    assert torch.equal(both(copied)[1], both(model)[1])
    model.save_pretrained(tmp_path)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}], ids=str)
def test_what_is_neither_greedy_nor_sampled_is_refused(settings):
    with pytest.raises(ConfigError, match=r"the decode loop does no .* search: leave out custom_generate"):
        llama().generate(IDS, **GREEDY, **settings, custom_generate=countdown.decode_loop)


def change_hooks(model: Any) -> None:
    model._there[0].remove()
    model._there = [model.model.layers[0].register_forward_hook(lambda _, __, output: output * 1.5)]


def halve(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(0.1).add_(0.3)


def slow_down(model: Any) -> None:
    rotary = model.model.rotary_emb
    for name, buffer in list(rotary.named_buffers()):
        setattr(rotary, name, buffer * 0.3)


CHANGES = {
    "another hook": change_hooks,
    "weights in place": halve,
    "buffers": slow_down,
    "an attribute": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 9.0),
    "the configuration": lambda model: setattr(model.config, "final_logit_softcapping", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_in_a_model_is_seen(change):
    model = gemma3()
    model._there = [model.model.layers[0].register_forward_hook(lambda _, __, output: -output)]
    assert torch.equal(*both(model))
    kept = vars(model)[module._KEPT]
    assert kept.serves(model, 20)
    CHANGES[change](model)
    assert not kept.serves(model, 20)
    assert torch.equal(*both(model))


def test_a_sparse_model_is_traced_once(tokenizer, text, monkeypatch):
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    both(model)
    monkeypatch.setattr(module, "DecodeLoop", None)
    assert torch.equal(*both(model, IDS[:, :6]))


def test_a_model_that_has_a_loop_can_be_pickled():
    model = llama()
    both(model)
    assert torch.equal(both(pickle.loads(pickle.dumps(model)))[1], both(model)[0])
