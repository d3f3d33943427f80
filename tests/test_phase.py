"""Phases: said for each token by the decoder's call or by whoever drives it, never guessed from a shape."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import countdown
from calls import sparse_module
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import cache_argument
from countdown.methods import method
from countdown.modules import sparse_modules
from countdown.phase import GENERATED, PADDING, PROMPT, Phases, phases
from countdown.sites.recognise import recognise
from tiny import SMALL, llama, spread

IDS = torch.randint(0, 250, (2, 7), generator=torch.Generator().manual_seed(0))


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=257, hidden_size=24, ffn_dim=53, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, word_embed_proj_dim=24,
    )  # fmt: skip
    return spread(OPTForCausalLM(config).eval())


def calibrated(model, tokenizer, text, name="m-countdown", **settings):
    config = method(name, sparsity=0.5, **settings)
    batch = tokenizer(text[:1000])["input_ids"]
    rows = {"input_ids": torch.tensor(batch[:256]).view(4, 64), "attention_mask": torch.ones(4, 64).long()}
    return countdown.calibrate(model, tokenizer, rows, config, progress=False)


def test_tokens_that_a_layer_flattens_are_sparse_and_counted(tokenizer, text):
    model = opt()
    countdown.sparsify_(model, calibrated(model, tokenizer, text, "teal"))
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    counted = {site.name: site.tokens for site in countdown.status(model)}
    assert set(counted.values()) == {2 * 3}, counted
    assert all(0.2 < site.realised_sparsity < 0.8 for site in countdown.status(model))


def test_a_shared_ffn_beside_experts_is_sparse_and_counted():
    torch.manual_seed(0)
    sizes = {**SMALL, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 53, "num_experts": 4}
    model = spread(Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts_per_tok=2)).eval())
    now, name = Phases(), "model.layers.1.mlp.shared_expert"
    site = recognise(name, model.get_submodule(name), [])
    module = sparse_module(site, method("m-countdown"), torch.full((53,), 0.5), apply_to="decode", phases=now)
    model.set_submodule(name, module)
    now.watch(model.model)
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, pad_token_id=0)
    assert module.counters[0] == 2 * 3


@torch.no_grad()
def test_a_module_outside_of_its_decoder_is_dense(llama_model, tokenizer, text):
    x = torch.randn(1, 1, 24)
    dense = llama_model.model.layers[1].mlp(x)
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text))
    llama_model(IDS[:, :1])
    module = llama_model.model.layers[1].mlp
    before = module.counters.clone()
    torch.testing.assert_close(module(x), dense)  # W_down lies otherwise, so sums are in another order
    assert torch.equal(module.counters, before)
    with phases(llama_model, "generated"):
        assert not torch.allclose(module(x), dense)


@torch.no_grad()
@pytest.mark.parametrize("apply_to", ["decode", "all"])
@pytest.mark.parametrize("decision", ["threshold", "topk"])
def test_phases_that_a_driver_mixes_in_one_call(decision, apply_to, llama_model, tokenizer, text):
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text, decision=decision), apply_to=apply_to)
    module = llama_model.model.layers[1].mlp
    x = torch.randn(2, 3, 24)
    sparse, dense = module.sparse(x), module.dense(x)
    module.counters.zero_()
    now = torch.tensor([PROMPT, PROMPT, GENERATED, PADDING, PADDING, GENERATED], dtype=torch.uint8)
    with phases(llama_model, now):
        y = module(x).view(6, 24)
    expected = [dense if apply_to == "decode" else sparse, sparse, torch.zeros(2, 3, 24)]
    for token, phase in enumerate([PROMPT, PROMPT, GENERATED, PADDING, PADDING, GENERATED]):
        wanted = [sparse, expected[0], expected[2]][phase].view(6, 24)[token]
        torch.testing.assert_close(y[token], wanted)
    assert module.counters[0] == (2 if apply_to == "decode" else 4)


@torch.no_grad()
def test_a_model_driven_with_phases_writes_what_the_default_does(llama_model, tokenizer, text):
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text))
    ids = IDS[:1]
    prompt = llama_model(ids[:, :-1], use_cache=True)
    expected = llama_model(ids[:, -1:], **cache_argument(llama_model, prompt.past_key_values)).logits[0, -1]
    countdown.reset_counters(llama_model)
    now = torch.tensor([PROMPT] * 6 + [GENERATED], dtype=torch.uint8)
    with phases(llama_model, now):
        found = llama_model(ids).logits[0, -1]
    torch.testing.assert_close(found, expected)
    assert {site.tokens for site in countdown.status(llama_model)} == {1}


def test_what_cannot_be_a_phase_is_refused(llama_model, tokenizer, text):
    with pytest.raises(UnsupportedModelError, match="is not sparsified"), phases(llama_model, "prompt"):
        pass
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text))
    with pytest.raises(ConfigError, match="phase is 'prefill', expected one of"), phases(llama_model, "prefill"):
        pass
    for now, message in (
        (torch.zeros(3).long(), r"phases are torch\.int64"),
        (torch.zeros(6, dtype=torch.uint8)[::2], r"phases are torch\.uint8, strided"),
        (torch.zeros(7, dtype=torch.uint8, device="meta"), "phases are on meta, the model on cpu"),
        *((wrong, "expected one of: generated, prompt, padding, or a uint8 tensor") for wrong in (1, b"prompt", [1])),
        (None, "phase is None"),
    ):
        with pytest.raises(ConfigError, match=message), phases(llama_model, now):
            pass
    wrong = torch.zeros(3, dtype=torch.uint8)
    with (
        pytest.raises(ValueError, match=r"expected contiguous uint8 \(7,\)"),
        phases(llama_model, wrong),
        torch.no_grad(),
    ):
        llama_model(IDS[:1])


def test_restoring_removes_the_hooks(llama_model, tokenizer, text):
    decoder = llama_model.get_decoder()
    before = {name: copy.copy(value) for name, value in vars(decoder).items() if "hooks" in name}
    profile = calibrated(llama_model, tokenizer, text)
    countdown.sparsify_(llama_model, profile)
    assert {name: value for name, value in vars(decoder).items() if "hooks" in name} != before
    countdown.restore_(llama_model)
    assert {name: value for name, value in vars(decoder).items() if "hooks" in name} == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_phases_of_their_own(copied, llama_model, tokenizer, text):
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text))
    other = copied(llama_model)
    found = {id(module.phases) for module in sparse_modules(other).values()}
    assert len(found) == 1
    assert found != {id(module.phases) for module in sparse_modules(llama_model).values()}
    other.generate(IDS, max_new_tokens=4, pad_token_id=0)
    assert {site.tokens for site in countdown.status(other)} == {6}
    assert {site.tokens for site in countdown.status(llama_model)} == {0}
    countdown.restore_(other)
    assert not other.model._forward_pre_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_driven_model_is_not_driven(copied, llama_model, tokenizer, text):
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text))
    with phases(llama_model, "prompt"):
        other = copied(llama_model)
    other.generate(IDS, max_new_tokens=4, pad_token_id=0)
    assert {site.tokens for site in countdown.status(other)} == {6}


@torch.no_grad()
def test_tokens_are_found_by_place_as_by_name(llama_model, tokenizer, text):
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text))
    decoder = llama_model.get_decoder()
    one, many = (torch.randn(2, count, 24) for count in (1, 5))
    for given in ((IDS[:, :1],), (None, None, None, None, one)):
        countdown.reset_counters(llama_model)
        decoder(*given, use_cache=False)
        assert {site.tokens for site in countdown.status(llama_model)} == {2}
    for given in ((IDS,), (None, None, None, None, many)):
        countdown.reset_counters(llama_model)
        decoder(*given, use_cache=False)
        assert {site.tokens for site in countdown.status(llama_model)} == {0}


@torch.no_grad()
def test_a_call_inside_a_call_leaves_the_outer_phase(llama_model, tokenizer, text):
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text))
    decoder, calls = llama_model.get_decoder(), []

    def inner(*_):
        if not calls:
            calls.append(1)
            decoder(IDS, use_cache=False)

    decoder.layers[0].register_forward_pre_hook(inner)
    decoder(IDS[:, :1], use_cache=False)
    assert len(calls) == 1
    assert {site.tokens for site in countdown.status(llama_model)} == {2}


def test_threads_have_phases_of_their_own(llama_model, tokenizer, text):
    countdown.sparsify_(llama_model, calibrated(llama_model, tokenizer, text))
    prompts = [IDS[:1], IDS[1:, :4]]

    def write(ids):
        return llama_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, pad_token_id=0
        ).tolist()

    expected = [write(ids) for ids in prompts]
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(write, prompts)) == expected


@torch.no_grad()
def test_compiled_calls_know_their_phase(tokenizer, text):
    model = llama()
    countdown.sparsify_(model, calibrated(model, tokenizer, text))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = [model(ids, use_cache=False).logits for ids in (IDS, IDS[:, :1])]
    countdown.reset_counters(model)
    for ids, logits in zip((IDS, IDS[:, :1]), expected, strict=True):
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits)
    torch._dynamo.reset()
    assert {site.tokens for site in countdown.status(model)} == {2}
