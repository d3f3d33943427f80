"""Calibration against statistics computed from kept activations, and its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import llama
from countdown.calibration.calibrate import calibrate, calibrate_all
from countdown.calibration.text import windows
from countdown.errors import ConfigError, CountdownError, TextError, UnsupportedModelError
from countdown.methods import method, method_class, method_names
from countdown.models.ffn import find_ffns

TOKENS = 2048


@pytest.fixture
def kept(model, tokenizer, text):
    """For each FFN, a and u over the calibration tokens, float32 [tokens, h]."""
    ffns, inputs = find_ffns(model), {}
    hooks = [
        ffn.module.register_forward_pre_hook(lambda _, x, name=ffn.name: inputs.setdefault(name, []).append(x[0]))
        for ffn in ffns
    ]
    with torch.no_grad():
        for window in windows(tokenizer, text, count=TOKENS // 512):
            model(window[None])
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return {ffn.name: ffn.project(torch.cat(inputs[ffn.name], dim=1)[0]) for ffn in ffns}


def test_statistics_are_those_of_the_activations(model, tokenizer, text, kept):
    configs = [
        method(name, weighting=weighting) for name in method_names() for weighting in method_class(name).weightings
    ]
    profiles = calibrate_all(model, tokenizer, text, configs, tokens=TOKENS, progress=False)
    ffns = {ffn.name: ffn for ffn in find_ffns(model)}
    for config, profile in zip(configs, profiles, strict=True):
        for name, site in profile.entries[0].sites.items():
            a, u = kept[name]
            moments = {"gate": a.double().square().mean(0), "up": u.double().square().mean(0)}
            expected = config.weights(moments, ffns[name].column_norms())
            value = config.indicator.formula(a, u)
            if expected is None:
                assert site.weights is None
            else:
                torch.testing.assert_close(site.weights.double(), expected, rtol=1e-5, atol=1e-8)
                value = value * expected
            if "threshold" not in config.decisions:
                assert site.sketch is None
                continue
            assert site.sketch.total == TOKENS * 53
            for q in (0.3, 0.5, 0.9):
                share = (value <= site.sketch.quantile(q)).double().mean().item()
                assert share == pytest.approx(q, abs=0.01)


def test_the_model_is_left_as_it_was(model, tokenizer, text):
    modules = dict(model.named_modules())
    calibrate(model, tokenizer, text, method("cats", weighting="rms"), tokens=512, progress=False)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())


def test_the_model_is_left_as_it_was_when_interrupted(llama_model, tokenizer, text, monkeypatch):
    original = llama_model.model.layers[1].mlp

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("countdown.calibration.statistics._check_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama_model, tokenizer, text, method("cats"), tokens=512, progress=False)
    assert llama_model.model.layers[1].mlp is original


def test_activations_that_are_not_finite_are_named(llama_model, tokenizer, text):
    with torch.no_grad():
        llama_model.model.layers[2].mlp.up_proj.weight[5, 0] = torch.inf
    with pytest.raises(CountdownError, match=r"model\.layers\.2\.mlp are not finite in torch\.float32"):
        calibrate(llama_model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)


def test_bad_input(llama_model, tokenizer, text):
    config = method("m-countdown")
    with pytest.raises(ConfigError, match="at least one window"):
        calibrate(llama_model, tokenizer, text, config, tokens=511)
    with pytest.raises(TextError, match="too few for"):
        calibrate(llama_model, tokenizer, "short", config, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        calibrate(llama_model.train(), tokenizer, text, config)


def test_provenance(model_folder, tokenizer, text):
    from countdown.models.loading import Source, load_model

    model = load_model(Source.parse(str(model_folder)), device="cpu")
    profile = calibrate(model, tokenizer, text, method("cats"), tokens=1024, progress=False)
    assert profile.base_model == {"name": "tiny-llama", "model_type": "llama"}
    assert profile.calibration["tokens"] == 1024
    assert profile.calibration["dtype"] == "float32"
    assert profile.entries[0].pattern == "model.layers.*.mlp"


_MEMORY = """
import resource, torch
from conftest import byte_tokenizer, llama
from countdown.calibration.calibrate import calibrate
from countdown.methods import method

model, tokenizer = llama(intermediate_size=512, num_hidden_layers=4), byte_tokenizer()
text = "some words that do not matter " * 2300

def peak(tokens):
    calibrate(model, tokenizer, text, method("m-countdown", weighting="rms"), tokens=tokens, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

# a and u of 56k more tokens, kept, would take 56k x 4 layers x 2 x 512 x 4 bytes = 900 MB.
before = peak(8192)
print(peak(65536) - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not on Windows")
def test_memory_does_not_grow_with_the_text():
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
    )
    assert float(run.stdout) < 50


def test_a_single_layer_has_its_own_name_as_pattern(tokenizer, text):
    model = llama(num_hidden_layers=1)
    profile = calibrate(model, tokenizer, text, method("cats"), tokens=512, progress=False)
    assert profile.entries[0].pattern == "model.layers.0.mlp"
