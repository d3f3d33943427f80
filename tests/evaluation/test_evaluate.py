"""The metrics against their definitions, and that dense numbers cannot pass for sparse ones."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

import countdown
from countdown.errors import ConfigError, CountdownError, TextError, UnsupportedModelError
from countdown.evaluation.evaluate import evaluate
from countdown.finite import not_finite
from countdown.loading import cache_argument
from countdown.methods import method
from countdown.modules import running, sparse_modules
from countdown.text import windows
from tiny import llama


@pytest.fixture
def sparse(model, tokenizer, text):
    profile = countdown.calibrate(
        model, tokenizer, text, method("m-countdown", sparsity=0.6), tokens=512, progress=False
    )
    return countdown.sparsify_(model, profile)


@pytest.fixture
def ids(tokenizer, text):
    return windows(tokenizer, text[20000:], count=3, length=32)


@torch.no_grad()
def scored_logits(model, ids, mode, protocol):
    """Logits of every scored position, and the tokens that followed."""
    if protocol == "all":
        with running(model, mode):
            return model(ids).logits[:, :-1].double(), ids[:, 1:]
    with running(model, "dense"):
        given = cache_argument(model, DynamicCache(config=model.config))
        model(ids[:, :16], **given, use_cache=True)
    rows = []
    for position in range(16, 31):
        with running(model, mode):
            rows.append(model(ids[:, position : position + 1], **given, use_cache=True).logits)
    return torch.cat(rows, dim=1).double(), ids[:, 17:]


@pytest.mark.parametrize("protocol, tokens", [("all", 3 * 31), ("decode", 3 * 15)])
def test_metrics_are_what_their_names_say(protocol, tokens, sparse, ids):
    result = evaluate(sparse, ids, protocol=protocol, progress=False)
    dense, targets = scored_logits(sparse, ids, "dense", protocol)
    pruned, _ = scored_logits(sparse, ids, "all" if protocol == "all" else "decode", protocol)
    p, q = dense.log_softmax(-1), pruned.log_softmax(-1)
    assert result.tokens == tokens
    nll = -q.gather(-1, targets[..., None]).mean().item()
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert result.dense_perplexity == pytest.approx(math.exp(-p.gather(-1, targets[..., None]).mean().item()), rel=1e-4)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.perplexity != result.dense_perplexity
    assert result.weights_read == pytest.approx((1 + 2 * (1 - result.realised_sparsity)) / 3)
    assert result.realised_sparsity == pytest.approx(sum(layer.realised for layer in result.layers) / 3)


def test_a_model_without_sparsity_agrees_with_itself(model, tokenizer, text, ids):
    profile = countdown.calibrate(model, tokenizer, text, method("cats"), tokens=512, progress=False)
    result = evaluate(countdown.sparsify_(model, profile, sparsity=0.0), ids, progress=False)
    assert result.perplexity == result.dense_perplexity
    assert (result.kl, result.top1, result.realised_sparsity, result.weights_read) == (0.0, 1.0, 0.0, 1.0)


def test_apply_to_is_left_as_it_was(sparse, ids):
    evaluate(sparse, ids, progress=False)
    assert {(m.apply_to, m.forced_dense) for m in sparse_modules(sparse).values()} == {("decode", False)}


def test_a_layer_that_stays_dense_is_noticed(sparse, ids):
    module = sparse_modules(sparse)["model.layers.1.mlp"]
    module.forward = module.dense.forward
    with pytest.raises(CountdownError, match=r"model\.layers\.1\.mlp computed 0 tokens sparsely, expected 96"):
        evaluate(sparse, ids, progress=False)


def test_a_large_vocabulary_is_summed_in_pieces(sparse, ids, monkeypatch):
    whole = evaluate(sparse, ids, progress=False)
    monkeypatch.setattr("countdown.memory.CPU_LOGITS", 257 * 7)
    pieces = evaluate(sparse, ids, progress=False)
    assert pieces.tokens == whole.tokens
    assert (pieces.perplexity, pieces.kl) == pytest.approx((whole.perplexity, whole.kl), rel=1e-6)


def test_windows_run_together_and_count_as_one_by_one(sparse, tokenizer, text, monkeypatch):
    rows = windows(tokenizer, text[20000:], count=7, length=32)
    uneven = {"input_ids": [*rows[:5], rows[5, :20], *rows[6:]]}
    shapes = []
    hook = sparse.model.layers[0].register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[:2])))
    together = evaluate(sparse, uneven, progress=False)
    assert shapes == [shape for shape in ((5, 32), (1, 20), (1, 32)) for _ in ("dense", "sparse")]
    monkeypatch.setattr("countdown.memory.CPU_TOKENS", 1)
    shapes.clear()
    alone = evaluate(sparse, uneven, progress=False)
    hook.remove()
    assert len(shapes) == 14
    assert (together.tokens, together.top1) == (alone.tokens, alone.top1) == (6 * 31 + 19, alone.top1)
    assert together.realised_sparsity == alone.realised_sparsity
    assert (together.perplexity, together.dense_perplexity, together.kl) == pytest.approx(
        (alone.perplexity, alone.dense_perplexity, alone.kl), rel=1e-5
    )


def test_weights_that_are_not_finite_are_named(sparse, ids):
    with torch.no_grad():
        sparse.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(
        CountdownError, match=r"logits of the dense model are not finite: model\.layers\.1\.mlp\.up_proj"
    ):
        evaluate(sparse, ids, progress=False)


def test_logits_of_the_sparse_model_alone(sparse, ids):
    module = sparse_modules(sparse)["model.layers.1.mlp"]
    module.register_forward_hook(lambda module, _, y: y if module.forced_dense else y * torch.inf)
    with pytest.raises(CountdownError, match=r"logits of the sparse model are not finite in float32\..*no wider dtype"):
        evaluate(sparse, ids, progress=False)


def test_a_perplexity_beyond_numbers_is_said(sparse, ids):
    with torch.no_grad():
        sparse.get_output_embeddings().weight.mul_(1e7)
    with pytest.raises(CountdownError, match=r"perplexity of the dense model is beyond what a number holds, e\^\d+:"):
        evaluate(sparse, ids, progress=False)


@pytest.mark.parametrize(
    "dtype, remedy", [(torch.float16, "--dtype bfloat16"), (torch.bfloat16, "--dtype float32"), (torch.float32, None)]
)
def test_the_remedy_is_a_dtype_that_holds_more(dtype, remedy):
    said = str(not_finite("activations are", llama(dtype)))
    assert said.startswith(f"activations are not finite in {str(dtype).removeprefix('torch.')}")
    assert said.count("--dtype") == (remedy is not None)
    assert remedy is None or remedy in said


def test_bad_input(sparse, ids):
    with pytest.raises(ConfigError, match="protocol is 'prefill'"):
        evaluate(sparse, ids, protocol="prefill")
    with pytest.raises(ConfigError, match="needs at least 3"):
        evaluate(sparse, ids[:, :2], protocol="decode")
    with pytest.raises(ConfigError, match="longer than the model's context"):
        evaluate(sparse, ids[:1].repeat(1, 5000))
    with pytest.raises(UnsupportedModelError, match="is not sparsified"):
        evaluate(llama(), ids)


@pytest.mark.parametrize(
    "given, message",
    [
        ("some text", r"windows are of type str, expected token ids: countdown\.windows"),
        (countdown.load_text("python-docs", "evaluation"), "windows are of type Text"),
        (None, "windows are of type NoneType"),
        (torch.zeros(2, 8), r"input_ids are torch\.float32, expected integers"),
    ],
    ids=["str", "text", "none", "floats"],
)
def test_what_is_no_window_is_refused(given, message, sparse):
    with pytest.raises(TextError, match=message):
        evaluate(sparse, given, progress=False)


def test_a_token_that_the_model_does_not_know_is_refused(sparse, ids):
    with pytest.raises(ConfigError, match="token 257, but the model knows 257 tokens"):
        evaluate(sparse, torch.full_like(ids, 257), progress=False)
