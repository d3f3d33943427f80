"""What people put around a model: PEFT adapters, padded batches, changed weights; for FFN and linear sites alike."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import countdown
from countdown.errors import CountdownError, TextError, UnsupportedModelError
from countdown.methods import method
from countdown.modules import sparse_modules
from tiny import llama

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(ids, **more).logits


def profile_of(model, tokenizer, text, name="m-countdown", **settings):
    return countdown.calibrate(model, tokenizer, text, method(name, **settings), tokens=1024, progress=False)


def with_lora(model, *targets):
    config = LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("sparse_first", [True, False])
def test_lora_on_attention_works_either_way_round(sparse_first, tokenizer, text):
    profile = profile_of(llama(), tokenizer, text)
    base = llama()
    if sparse_first:
        model = with_lora(countdown.sparsify_(base, profile, apply_to="all"), "q_proj", "v_proj")
    else:
        model = countdown.sparsify_(with_lora(base, "q_proj", "v_proj"), profile, apply_to="all")
    sparse = logits(model)
    assert [site.tokens for site in countdown.status(model)] == [8, 8, 8]
    with model.disable_adapter():
        assert not torch.equal(logits(model), sparse)
    countdown.restore_(model)
    dense = logits(model)
    assert not torch.equal(dense, sparse)
    assert torch.equal(logits(with_lora(llama(), "q_proj", "v_proj")), dense)


def test_a_profile_calibrated_around_lora_fits_the_model_around_it(tokenizer, text):
    model = with_lora(llama(), "q_proj")
    profile = profile_of(model, tokenizer, text)
    countdown.sparsify_(model, profile, apply_to="all")
    assert logits(model).isfinite().all()
    assert next(site.name for site in countdown.status(model)).endswith("model.layers.0.mlp")


def test_lora_that_comes_later_stays_when_the_model_is_restored(tokenizer, text):
    model = countdown.sparsify_(llama(), profile_of(llama(), tokenizer, text))
    wrapped = with_lora(model, "down_proj")
    countdown.restore_(wrapped)
    expected = with_lora(llama(), "down_proj")
    assert torch.equal(logits(wrapped), logits(expected))


def test_a_linear_that_is_replaced_is_replaced_in_the_dense_path_too(tokenizer, text):
    model = countdown.sparsify_(llama(), profile_of(llama(), tokenizer, text))
    model.model.layers[0].mlp.gate_proj = nn.Linear(24, 53, bias=False)
    expected = llama()
    expected.model.layers[0].mlp.gate_proj = model.model.layers[0].mlp.gate_proj
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(countdown.restore_(model)), logits(expected))


def test_lora_on_the_ffn_is_refused_by_name(tokenizer, text):
    profile = profile_of(llama(), tokenizer, text)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj is a peft\.tuners\.lora.*expected a plain"):
        countdown.sparsify_(with_lora(llama(), "up_proj"), profile)


def test_lora_that_comes_to_the_ffn_later_is_refused_when_it_runs(tokenizer, text):
    model = countdown.sparsify_(llama(), profile_of(llama(), tokenizer, text), apply_to="all")
    with pytest.raises(UnsupportedModelError, match=r"down_proj is a peft\.tuners\.lora"):
        logits(with_lora(model, "down_proj"))


def test_lora_on_a_linear_that_teal_takes_is_refused_by_name(tokenizer, text):
    profile = profile_of(llama(), tokenizer, text, "teal")
    with pytest.raises(UnsupportedModelError, match=r"q_proj is a peft\.tuners\.lora"):
        countdown.sparsify_(with_lora(llama(), "q_proj"), profile)


def test_a_quantised_ffn_is_refused_by_name(tokenizer, text):
    class Linear4bit(nn.Linear):
        pass

    model = llama()
    model.model.layers[1].mlp.gate_proj = Linear4bit(24, 53, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.gate_proj is a .*Linear4bit"):
        profile_of(model, tokenizer, text)


@pytest.mark.parametrize("name", ["m-countdown", "teal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token_of_a_batch(name, side, tokenizer, text):
    model = llama()
    countdown.sparsify_(model, profile_of(model, tokenizer, text, name), apply_to="all")
    rows = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 9, 6)]
    ids, mask = padded(rows, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, kept, out in zip(rows, mask.bool(), together, strict=True):
        torch.testing.assert_close(out[kept], logits(model, row[None])[0], rtol=1e-4, atol=1e-5)


def test_a_left_padded_batch_generates_what_its_rows_do(tokenizer, text):
    model = llama()
    countdown.sparsify_(model, profile_of(model, tokenizer, text))
    rows = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 9, 6)]
    ids, mask = padded(rows, "left")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    alone = [model.generate(row[None], **settings)[0, len(row) :] for row in rows]
    assert torch.equal(together, torch.stack(alone))


def padded(rows, side):
    """Pad with a token that would matter, were it not masked."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), 77)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_of_statistics_and_metrics(side, tokenizer, text):
    model, config = llama(), method("m-countdown", sparsity=0.6, weighting="rms")
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 256, (n,), generator=generator) for n in (40, 90, 60, 20)]
    ids, mask = padded(rows, side)
    batch = {"input_ids": ids, "attention_mask": mask}
    got = countdown.calibrate(model, tokenizer, batch, config, progress=False)
    assert got.calibration["tokens"] == 210
    other = countdown.calibrate(
        model,
        tokenizer,
        {"input_ids": torch.where(mask.bool(), ids, 5), "attention_mask": mask},
        config,
        progress=False,
    )
    for one, same in zip(got.entries[0].sites.values(), other.entries[0].sites.values(), strict=True):
        assert torch.equal(one["multipliers"], same["multipliers"])
        assert torch.equal(one["thresholds"], same["thresholds"])
    countdown.sparsify_(model, got)
    result = countdown.evaluate(model, batch, progress=False)
    assert result.tokens == 206
    kls = [countdown.evaluate(model, row[None], progress=False) for row in rows]
    assert result.kl == pytest.approx(sum(one.kl * one.tokens for one in kls) / 206, rel=1e-5)
    sparsity = sum(one.realised_sparsity * (one.tokens + 1) for one in kls) / 210
    assert result.realised_sparsity == pytest.approx(sparsity)


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"input_ids": []}, "no input_ids"),
        ({}, "no input_ids"),
        ({"input_ids": [[1, 2], []]}, "is empty"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3)}, "nothing but padding"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)}, "do not fit together"),
        ({"input_ids": torch.ones(3).long()}, "do not fit together"),
    ],
)
def test_batches_that_are_none_are_said(batch, message, tokenizer):
    with pytest.raises(TextError, match=message):
        countdown.calibrate(llama(), tokenizer, batch, method("cats"), progress=False)


def test_lists_without_padding_are_a_batch_too(tokenizer):
    batch = {"input_ids": [[5, 6, 7, 8], [9, 10]], "attention_mask": None}
    assert countdown.calibrate(llama(), tokenizer, batch, method("cats"), progress=False).calibration["tokens"] == 6


@pytest.mark.parametrize("assign", [False, True])
def test_a_sparse_linear_never_uses_stale_weights(assign, tokenizer, text):
    model = llama()
    countdown.sparsify_(model, profile_of(model, tokenizer, text, "teal"), apply_to="all")
    before = logits(model)
    other = {name: -tensor if "o_proj" in name else tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(other, assign=assign)
    assert not torch.equal(logits(model), before)
    expected = llama()
    expected.load_state_dict(other)
    assert torch.equal(logits(countdown.restore_(model)), logits(expected))


def test_a_sparse_linear_is_copied_moved_and_restored(tokenizer, text):
    model = llama()
    dense = logits(model)
    names = [name for name, _ in model.named_parameters()]
    countdown.sparsify_(model, profile_of(model, tokenizer, text, "teal"), apply_to="all")
    assert [name for name, _ in model.named_parameters()] == names
    sparse = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), sparse)
    assert countdown.restore_(other).model.layers[0].self_attn.q_proj.weight.eq(0).all()
    half = copy.deepcopy(model).to(torch.float16)
    assert {module.per_term.dtype for module in sparse_modules(half).values()} == {torch.float32}
    assert countdown.restore_(half).model.layers[0].self_attn.q_proj.weight.dtype == torch.float16
    assert torch.equal(logits(countdown.restore_(model)), dense)


def test_sparse_linears_compile_in_one_graph_and_the_compiled_code_runs(tokenizer, text):
    model = llama()
    countdown.sparsify_(model, profile_of(model, tokenizer, text, "teal"), apply_to="all")
    expected = logits(model, use_cache=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    countdown.reset_counters(model)
    torch.testing.assert_close(logits(compiled, use_cache=False), expected)
    assert counter.frame_count == 1
    calls = [node for graph in counter.graphs for node in graph.graph.nodes if "countdown.sparse" in str(node.target)]
    assert len(calls) == 21
    assert {site.tokens for site in countdown.status(model)} == {8}


def test_copied_under_inference_mode_it_runs_outside_of_it(tokenizer, text):
    model = countdown.sparsify_(llama(), profile_of(llama(), tokenizer, text), apply_to="all")
    with torch.inference_mode():
        other = copy.deepcopy(model)
    logits(other)
    assert countdown.status(other)[0].tokens == 8


@pytest.mark.parametrize("name", ["m-countdown", "cats", "d-countdown", "teal"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_computed_as_dense(name, poison, tokenizer, text):
    model = llama()
    profile = profile_of(model, tokenizer, text, name, sparsity=0.7)
    site = model.model.layers[1].mlp
    x = torch.randn(1, 3, 24)
    x[0, 1, 5] = poison
    dense = site(x)
    countdown.sparsify_(model, profile, apply_to="all")
    with torch.no_grad():
        sparse = model.model.layers[1].mlp(x)
    torch.testing.assert_close(sparse[0, 1], dense[0, 1], equal_nan=True)
    assert sparse[0, [0, 2]].isfinite().all()
    assert not torch.equal(sparse[0, 0], dense[0, 0])


@pytest.mark.parametrize("name", ["m-countdown", "cats", "d-countdown", "teal"])
def test_an_input_of_zeros_gives_zeros(name, tokenizer, text):
    model = llama()
    countdown.sparsify_(model, profile_of(model, tokenizer, text, name, sparsity=0.7), apply_to="all")
    with torch.no_grad():
        assert model.model.layers[0].mlp(torch.zeros(1, 2, 24)).eq(0).all()


@pytest.mark.parametrize("decision", ["threshold", "topk"])
def test_neurons_that_never_vary_are_dropped_and_hurt_nothing(decision, tokenizer, text):
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:20] = 0
    before = logits(model)
    settings = {"weighting": "rms", "sparsity": 20 / 53, "decision": decision}
    countdown.sparsify_(model, profile_of(model, tokenizer, text, **settings), apply_to="all")
    torch.testing.assert_close(logits(model), before)
    assert countdown.status(model)[0].realised_sparsity == pytest.approx(20 / 53, abs=0.01)


def test_a_layer_of_nothing_but_zeros_calibrates(tokenizer, text):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    for allocation in ("uniform", "global"):
        profile = profile_of(model, tokenizer, text, weighting="rms", sparsity=0.5, allocation=allocation)
        countdown.sparsify_(model, profile, apply_to="all")
        assert logits(model).isfinite().all()
        countdown.restore_(model)


def test_global_allocation_under_inference_mode(tokenizer, text):
    config = method("m-countdown", sparsity=0.5, allocation="global")
    plain = countdown.calibrate(llama(), tokenizer, text, config, tokens=1024, progress=False)
    model = llama()
    with torch.inference_mode():
        other = countdown.calibrate(model, tokenizer, text, config, tokens=1024, progress=False)
        made_inside = llama()
    with pytest.raises(UnsupportedModelError, match="load it outside"):
        countdown.calibrate(made_inside, tokenizer, text, config, tokens=1024, progress=False)
    for one, same in zip(plain.entries[0].sites.values(), other.entries[0].sites.values(), strict=True):
        assert torch.equal(one["errors"], same["errors"])


def test_an_output_that_is_not_finite_is_said(tokenizer, text):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.inf
    config = method("m-countdown", sparsity=0.5, allocation="global")
    with pytest.raises(CountdownError, match=r"effect of .* is not finite: lm_head\.weight"):
        countdown.calibrate(model, tokenizer, text, config, tokens=1024, progress=False)
