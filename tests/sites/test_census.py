"""Every class that docs/models.md lists as verified, through what the commands call: calibrate, evaluate, generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import countdown
from countdown.errors import UnsupportedModelError
from countdown.methods import method
from countdown.sparsify import status
from scripts import BENCHMARKS, script

RECORDS = json.loads((BENCHMARKS / "results" / "census.json").read_text(encoding="utf-8"))["records"]
VERIFIED = [one for one in RECORDS if one["outcome"] == "accepted" and one["verified"] == "end to end"]
# Larger ones differ from these in their towers, which are left alone.
CAUSAL = [one["class"] for one in VERIFIED if "causal-lm" in one["mapping"]]
# docs/models.md says so: they are no decoders of text alone.
WITH_ENCODER = ["Pix2StructForConditionalGeneration", "T5Gemma2ForConditionalGeneration"]
# And these have caches of their own.
NO_DECODE_PROTOCOL = ["xLSTMForCausalLM"]
TOKENS = 12


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = script("census").build(cls)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.dim() > 1):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)  # some classes begin as all zeros
    return model


def batch(model: Any) -> dict[str, torch.Tensor]:
    special = set(script("census")._flat(model.config.to_dict()))
    usual = torch.tensor([token for token in range(3, 250) if token not in special])
    ids = usual[torch.randint(len(usual), (2, TOKENS), generator=torch.Generator().manual_seed(0))]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_a_verified_class_is_calibrated_evaluated_and_generates(name):
    model = built(name)
    given = batch(model)
    profile = countdown.calibrate(model, None, given, method("m-countdown", weighting="rms"), progress=False)
    countdown.sparsify_(model, profile)
    found = countdown.evaluate(model, given, progress=False)
    assert found.tokens == 2 * (TOKENS - 1)
    assert 0 < found.realised_sparsity < 1
    if name not in NO_DECODE_PROTOCOL:
        assert countdown.evaluate(model, given, protocol="decode", progress=False).tokens == 2 * (TOKENS // 2 - 1)
    else:
        with pytest.raises(UnsupportedModelError, match=f"^{name} does not decode with the cache"):
            countdown.evaluate(model, given, protocol="decode", progress=False)
    countdown.reset_counters(model)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    made = model.generate(given["input_ids"][:1], attention_mask=given["attention_mask"][:1], **settings)
    assert made.shape == (1, TOKENS + 4)
    assert {site.tokens for site in status(model)} == {3}  # the first new token is the prompt's


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ENCODER)
def test_a_decoder_behind_an_encoder_is_refused_in_a_line(name):
    model = built(name)
    with pytest.raises(UnsupportedModelError, match=f"^{name} has an encoder"):
        countdown.calibrate(model, None, batch(model), method("m-countdown"), progress=False)
