"""Continuations: metrics against their definitions, files of prompts, and that dense cannot pass for sparse."""

from __future__ import annotations

import math

import pytest
import torch

import countdown
from countdown.errors import ConfigError, CountdownError, TextError, UnsupportedModelError
from countdown.evaluation.continuations import compare_continuations, levenshtein, load_prompts
from countdown.evaluation.generation import encode_prompt, generate
from countdown.methods import method
from countdown.modules import running, sparse_modules
from tiny import llama

PROMPTS = ["tell me", "what is it", "go on then", "a"]


@pytest.fixture
def sparse(llama_model, tokenizer, text):
    profile = countdown.calibrate(
        llama_model, tokenizer, text, method("m-countdown", sparsity=0.7), tokens=512, progress=False
    )
    return countdown.sparsify_(llama_model, profile)


def compared(model, tokenizer, prompts=PROMPTS, **settings):
    return compare_continuations(model, tokenizer, prompts, max_new_tokens=12, progress=False, **settings)


@torch.no_grad()
def nll(model, prompt, tokens):
    with running(model, "dense"):
        logits = model(torch.cat([prompt, torch.tensor([tokens])], dim=1)).logits[0].double()
    start = prompt.shape[1] - 1
    return -sum(logits[start + place].log_softmax(-1)[token].item() for place, token in enumerate(tokens))


@pytest.mark.parametrize("apply_to", ["decode", "all"])
def test_metrics_are_what_their_names_say(apply_to, sparse, tokenizer):
    result = compared(sparse, tokenizer, apply_to=apply_to)
    assert result.identical < 1
    for prompt, found in zip(PROMPTS, result.continuations, strict=True):
        ids = encode_prompt(tokenizer, prompt)
        with running(sparse, "dense"):
            dense = generate(sparse, tokenizer, ids, max_new_tokens=12)
        with running(sparse, apply_to):
            pruned = generate(sparse, tokenizer, ids, max_new_tokens=12)
        assert (found.prompt, found.dense_text, found.text) == (prompt, dense.text, pruned.text)
        same = [a == b for a, b in zip(dense.tokens, pruned.tokens, strict=True)]
        assert found.first_divergence == (None if all(same) else same.index(False))
        assert found.edit_distance == levenshtein(dense.tokens, pruned.tokens) / 12
        assert found.dense_perplexity == pytest.approx(math.exp(nll(sparse, ids, dense.tokens) / 12), rel=1e-4)
        assert found.perplexity == pytest.approx(math.exp(nll(sparse, ids, pruned.tokens) / 12), rel=1e-4)
    logs = [math.log(one.perplexity / one.dense_perplexity) for one in result.continuations]
    assert result.perplexity_ratio.mean == pytest.approx(math.exp(sum(logs) / len(logs)))
    assert result.perplexity_ratio.low < result.perplexity_ratio.mean < result.perplexity_ratio.high
    assert result.edit_distance.mean == pytest.approx(sum(one.edit_distance for one in result.continuations) / 4)
    assert 0.5 < result.realised_sparsity < 0.9


def test_a_model_without_sparsity_writes_the_same(on_reference, sparse, tokenizer, text):
    countdown.restore_(sparse)
    profile = countdown.calibrate(sparse, tokenizer, text, method("cats"), tokens=512, progress=False)
    result = compared(countdown.sparsify_(sparse, profile, sparsity=0.0), tokenizer)
    assert (result.identical, result.edit_distance.mean, result.perplexity_ratio.mean) == (1.0, 0.0, 1.0)
    assert result.shared_tokens.mean == 12


def test_the_model_is_left_as_it_was(sparse, tokenizer):
    compared(sparse, tokenizer, apply_to="all")
    assert {(m.apply_to, m.forced_dense) for m in sparse_modules(sparse).values()} == {("decode", False)}


def test_a_layer_that_stays_dense_is_noticed(sparse, tokenizer):
    module = sparse_modules(sparse)["model.layers.1.mlp"]
    module.forward = module.dense.forward
    with pytest.raises(CountdownError, match=r"model\.layers\.1\.mlp computed 0 tokens sparsely, expected 45"):
        compared(sparse, tokenizer)


def test_weights_that_are_not_finite_are_named(sparse, tokenizer):
    with torch.no_grad():
        sparse.lm_head.weight[3] = torch.nan
    with pytest.raises(CountdownError, match=r"logits of the dense model are not finite: lm_head\.weight"):
        compared(sparse, tokenizer)


def test_records_are_flat(sparse, tokenizer):
    first, *rest = compared(sparse, tokenizer).records()
    assert (first["scope"], first["prompts"], first["apply_to"]) == ("all prompts", 4, "decode")
    assert first["edit_distance_low"] <= first["edit_distance"] <= first["edit_distance_high"]
    assert [record["prompt"] for record in rest] == PROMPTS
    plain = (str, int, float, type(None))
    assert all(isinstance(value, plain) for record in (first, *rest) for value in record.values())


@pytest.mark.parametrize(
    "one, other, distance",
    [([], [], 0), ([1, 2, 3], [1, 2, 3], 0), ([1, 2, 3], [], 3), ([1, 2, 3], [2, 3], 1), ([1, 2, 3, 4], [1, 5, 3], 2)],
)
def test_levenshtein(one, other, distance):
    assert levenshtein(one, other) == levenshtein(other, one) == distance


def test_files_of_prompts(tmp_path):
    lines, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text('first\n\n  second {"prompt": 1}\n', encoding="utf-8")
    assert load_prompts(lines) == ["first", 'second {"prompt": 1}']
    objects.write_text('{"prompt": "two\\nlines", "id": 7}\n\n{"prompt": "é"}\n', encoding="utf-8")
    assert load_prompts(objects) == ["two\nlines", "é"]


def test_lines_of_prompts_end_at_newlines_alone(tmp_path):
    lines, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    odd = "one\u2028two\x85three\x0bfour"
    objects.write_bytes(f'\ufeff{{"prompt": "{odd.replace(chr(11), "")}"}}\r\n{{"prompt": "b"}}'.encode())
    assert load_prompts(objects) == [odd.replace("\x0b", ""), "b"]
    lines.write_bytes(f"\ufeff{odd}\r\nb".encode())
    assert load_prompts(lines) == [odd, "b"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "\n \n", "has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', "line 2: expected an object"),
        ("p.jsonl", "not json\n", "line 1: expected an object"),
        ("p.jsonl", '["prompt"]\n', "line 1: expected an object"),
        ("p.jsonl", '{"prompt": 3}\n', "the prompt is 3, expected text"),
        ("p.jsonl", '{"prompt": "half \\ud83d"}\n', "line 1: the prompt is 'half .ud83d', expected text"),
        ("p.jsonl", "[" * 100_000, "line 1: expected an object"),
        ("nope.txt", None, "nope.txt cannot be read: No such file or directory"),
    ],
)
def test_files_that_are_not(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message):
        load_prompts(tmp_path / name)


def test_bad_input(sparse, tokenizer):
    with pytest.raises(ConfigError, match="at least 2"):
        compare_continuations(sparse, tokenizer, PROMPTS, max_new_tokens=1)
    with pytest.raises(ConfigError, match="no prompts"):
        compared(sparse, tokenizer, [])
    with pytest.raises(ConfigError, match="apply_to is 'most'"):
        compared(sparse, tokenizer, apply_to="most")
    with pytest.raises(UnsupportedModelError, match="is not sparsified"):
        compared(llama(), tokenizer)
