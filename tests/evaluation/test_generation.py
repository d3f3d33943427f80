"""Streaming generation and where two generations part."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import ANY

import pytest
import torch

import countdown
from countdown import decoding
from countdown.errors import ConfigError
from countdown.evaluation.generation import encode_prompt, first_difference, generate
from countdown.methods import method
from countdown.sparsify import say_once
from tiny import byte_tokenizer


def test_what_is_streamed_is_what_is_returned(llama_model, tokenizer):
    pieces = []
    prompt = encode_prompt(tokenizer, "hello")
    result = generate(llama_model, tokenizer, prompt, max_new_tokens=12, write=pieces.append)
    expected = llama_model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    assert result.tokens == expected.tolist()
    assert "".join(pieces) == result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)
    assert result.tokens_per_s > 0
    assert result.by == "decode loop"


def test_it_ends_where_the_model_says_so(llama_model, tokenizer):
    prompt = encode_prompt(tokenizer, "hello")
    written = generate(llama_model, tokenizer, prompt, max_new_tokens=12).tokens
    last = written[5]
    for ends in (last, [200, last]):
        llama_model.generation_config.eos_token_id = ends
        assert generate(llama_model, tokenizer, prompt, max_new_tokens=12).tokens == written[: written.index(last) + 1]


def test_what_the_loop_does_not_heed_is_left_to_transformers(llama_model, tokenizer):
    prompt = encode_prompt(tokenizer, "hello")
    written = generate(llama_model, tokenizer, prompt, max_new_tokens=12)
    # Neutral, or of no meaning without sampling.
    for setting, value in (("repetition_penalty", 1.0), ("temperature", 0.3)):
        setattr(llama_model.generation_config, setting, value)
        assert generate(llama_model, tokenizer, prompt, max_new_tokens=12) == replace(written, tokens_per_s=ANY)
    llama_model.generation_config.suppress_tokens = [written.tokens[0]]
    other = generate(llama_model, tokenizer, prompt, max_new_tokens=12)
    assert (other.by, other.tokens[0] == written.tokens[0]) == ("transformers", False)


@pytest.mark.parametrize("setting", ["no_repeat_ngram_size", "min_new_tokens", "remove_invalid_values", "num_beams"])
def test_a_value_of_one_is_neutral_only_where_it_changes_nothing(setting, llama_model, tokenizer, caplog):
    prompt = torch.tensor([[1, 2, 3]])
    setattr(llama_model.generation_config, setting, True if setting.startswith("remove") else 1)
    if setting == "min_new_tokens":
        llama_model.generation_config.eos_token_id = 5
    say_once.cache_clear()
    written = generate(llama_model, tokenizer, prompt, max_new_tokens=12)
    assert written.by == ("decode loop" if setting == "num_beams" else "transformers")
    assert (f"does not heed the checkpoint's {setting}" in caplog.text) == (written.by == "transformers")
    if setting == "no_repeat_ngram_size":
        assert len(set(written.tokens)) == 12


def test_a_step_that_cannot_be_recorded_is_left_to_transformers(llama_model, tokenizer, monkeypatch, caplog):
    forward = type(llama_model.model.norm).forward

    def reading(self, x):
        return forward(self, x * 2 if x.sum() > 1e9 else x)

    prompt = encode_prompt(tokenizer, "hello")
    written = generate(llama_model, tokenizer, prompt, max_new_tokens=6)
    monkeypatch.setattr(type(llama_model.model.norm), "forward", reading)
    say_once.cache_clear()
    other = generate(llama_model, tokenizer, prompt, max_new_tokens=6)
    assert (written.by, other.by) == ("decode loop", "transformers")
    assert other.tokens == written.tokens
    assert "transformers generates, which is slower: the model's step reads the value of a tensor" in caplog.text


def test_what_fails_in_the_loop_is_left_to_transformers(llama_model, tokenizer, monkeypatch, caplog):
    def fails(*_):
        raise AttributeError("no is_sliding")

    prompt = encode_prompt(tokenizer, "hello")
    written = generate(llama_model, tokenizer, prompt, max_new_tokens=6)
    monkeypatch.setattr(decoding, "static_cache", fails)
    say_once.cache_clear()
    for _ in range(2):
        other = generate(llama_model, tokenizer, prompt, max_new_tokens=6)
        assert (other.by, other.tokens) == ("transformers", written.tokens)
    assert caplog.text.count("does not run in the decode loop: AttributeError: no is_sliding") == 1


def test_a_sparse_model_that_keeps_no_cache_by_default_is_sparse_all_the_same(llama_model, tokenizer, text):
    recipe = method("m-countdown", sparsity=0.5)
    countdown.sparsify_(
        llama_model, countdown.calibrate(llama_model, tokenizer, text, recipe, tokens=512, progress=False)
    )
    llama_model.generation_config.use_cache = False
    llama_model.generation_config.no_repeat_ngram_size = 9
    assert generate(llama_model, tokenizer, torch.tensor([[1, 2, 3]]), max_new_tokens=6).by == "transformers"
    assert {site.tokens for site in countdown.status(llama_model)} == {5}


def test_one_token_has_no_speed(llama_model, tokenizer):
    assert generate(llama_model, tokenizer, torch.tensor([[1, 2]]), max_new_tokens=1).tokens_per_s is None


def test_chat_template_and_raw():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")[0]) == "<hi>:"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", raw=True)[0]) == "hi"
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")[0]) == "hi"


@pytest.mark.parametrize(
    "one, other, where",
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([4], [5], 0)],
)
def test_first_difference(one, other, where):
    assert first_difference(one, other) == where


def test_bad_input(llama_model, tokenizer):
    with pytest.raises(ConfigError, match="prompt is empty"):
        encode_prompt(tokenizer, "  ")
    with pytest.raises(ConfigError, match=r"the prompt has 2000 tokens, .* shorten it to 1948 or ask for 48 new ones"):
        generate(llama_model, tokenizer, torch.ones(1, 2000, dtype=torch.int64), max_new_tokens=100)
    with pytest.raises(ConfigError, match="at least 1"):
        generate(llama_model, tokenizer, torch.tensor([[1]]), max_new_tokens=0)
