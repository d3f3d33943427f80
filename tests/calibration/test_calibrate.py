"""Calibration against statistics computed from kept activations, and its memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import countdown
from countdown.artifacts import Moment
from countdown.calibration.calibrate import calibrate, calibration_sequences
from countdown.calibration.looks import Looks
from countdown.calibration.passes.sketches import SiteSketches, _SparsePass
from countdown.errors import ConfigError, CountdownError, TextError, UnsupportedModelError
from countdown.methods import Method, method, method_class, method_names
from countdown.selectors import COEFFICIENT
from countdown.sites import find_sites
from countdown.sites.ffn import find_ffns
from countdown.text import Text, windows
from tiny import llama

TOKENS = 2048


@pytest.fixture
def kept(model, tokenizer, text):
    """For each site, its factors over the calibration tokens, float32 [tokens, terms]."""
    sites, inputs = find_sites(model, ["ffn", "linear"]), {}
    hooks = [
        site.module.register_forward_pre_hook(lambda _, x, name=site.name: inputs.setdefault(name, []).append(x[0]))
        for site in sites
    ]
    with torch.no_grad():
        for window in calibration_sequences(tokenizer, text, TOKENS):
            model(window[None])
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return {site.name: site.sum.project(torch.cat(inputs[site.name], dim=1)[0]) for site in sites}


EVERY = [method(name, weighting=weighting) for name in method_names() for weighting in method_class(name).weightings]


# What sites share has a test of its own.
@pytest.mark.parametrize("config", [config for config in EVERY if not config.shares_norms], ids=str)
def test_multipliers_are_those_of_the_activations(config, model, tokenizer, text, kept):
    profile = calibrate(model, tokenizer, text, config, tokens=TOKENS, progress=False)
    for site in find_sites(model, [config.kind]):
        squares = [factor.double().square().mean(0) for factor in kept[site.name]]
        moments = {Moment(name): square for name, square in zip(site.sum.factors, squares, strict=True)}
        expected = config.multipliers(moments, site.sum.weights[-1].values().double().norm(dim=0))
        multipliers = profile.entries[0].sites[site.name].get("multipliers")
        if expected is None:
            assert multipliers is None
        else:
            torch.testing.assert_close(multipliers.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("weighting", ["none", "rms"])
def test_every_layer_holds_its_target_when_all_are_sparse(weighting, sparsity, model, tokenizer, text):
    config = method("m-countdown", sparsity=sparsity, weighting=weighting)
    profile = calibrate(model, tokenizer, text, config, tokens=16384, progress=False)
    countdown.sparsify_(model, profile, apply_to="all")
    with torch.no_grad():
        model(torch.stack(calibration_sequences(tokenizer, text, 16384)))
    for site in countdown.status(model):
        assert site.realised_sparsity == pytest.approx(sparsity, abs=0.015)


def test_another_sparsity_holds_without_calibration(model, tokenizer, text):
    profile = calibrate(model, tokenizer, text, method("cats", sparsity=0.5), tokens=16384, progress=False)
    for sparsity in (0.15, 0.4, 0.65, 0.85, 0.95):
        countdown.sparsify_(model, profile, apply_to="all", sparsity=sparsity)
        with torch.no_grad():
            model(windows(tokenizer, text, count=16))
        mean = sum(site.realised_sparsity for site in countdown.status(model)) / 3
        assert mean == pytest.approx(sparsity, abs=0.02)
        countdown.restore_(model)


@dataclass(frozen=True, kw_only=True)
class OnlyTopk(Method):
    name = "only-topk"
    summary = source = ""
    unseen = None
    selector = COEFFICIENT
    decisions = {"topk": ""}  # noqa: RUF012

    decision: str = "topk"


def test_a_method_without_threshold_has_none(llama_model, tokenizer, text):
    profile = calibrate(llama_model, tokenizer, text, OnlyTopk(), tokens=512, progress=False)
    assert all("thresholds" not in site for site in profile.entries[0].sites.values())


def seen(values: torch.Tensor) -> Looks:
    looks = Looks(1)
    looks.add(values)
    return looks


def thresholds(by_level: dict[float, Looks]) -> torch.Tensor:
    return SiteSketches({(level,): looks for level, looks in by_level.items()}).thresholds()


def test_a_curve_lies_between_the_levels_it_was_made_at():
    uniform = torch.linspace(0, 1, 100_001)
    curve = thresholds({0.2: seen(uniform), 0.6: seen(uniform * 3)})
    assert curve.shape == (1000,)
    assert curve[0] == -1
    expected = {1: 0.001, 100: 0.1, 200: 0.2, 400: (0.4 + 1.2) / 2, 500: 0.25 * 0.5 + 0.75 * 1.5, 600: 1.8, 900: 2.7}
    for point, value in expected.items():
        assert curve[point].item() == pytest.approx(value, rel=0.02)


def test_a_curve_never_falls():
    uniform = torch.linspace(0, 1, 10_001)
    curve = thresholds({0.4: seen(uniform), 0.5: seen(uniform / 10)})
    assert (curve.diff() >= 0).all()


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

    monkeypatch.setattr("countdown.calibration.passes.sketches.Looks.add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama_model, tokenizer, text, method("cats"), tokens=512, progress=False)
    assert llama_model.model.layers[1].mlp is original


def test_activations_that_are_not_finite_are_named(llama_model, tokenizer, text):
    with torch.no_grad():
        llama_model.model.layers[2].mlp.up_proj.weight[5, 0] = torch.inf
    with pytest.raises(CountdownError, match=r"model\.layers\.2\.mlp are not finite: model\.layers\.2\.mlp\.up_proj"):
        calibrate(llama_model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)


def test_a_model_that_wants_more_than_text_is_refused(llama_model, tokenizer, text):
    def wanting(*_):
        raise ValueError("pixel_values must be given\nin any case")

    config = method("m-countdown")
    hook = llama_model.model.register_forward_pre_hook(wanting)
    with pytest.raises(
        UnsupportedModelError, match=r"^LlamaForCausalLM does not run on text alone: pixel_values must be given$"
    ):
        calibrate(llama_model, tokenizer, text, config, tokens=512, progress=False)
    hook.remove()
    llama_model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match=r"^LlamaForCausalLM has an encoder"):
        calibrate(llama_model, tokenizer, text, config, tokens=512, progress=False)


def test_bad_input(llama_model, tokenizer, text):
    config = method("m-countdown")
    with pytest.raises(ConfigError, match="at least one window"):
        calibrate(llama_model, tokenizer, text, config, tokens=511)
    for short in ("short", ""):
        with pytest.raises(TextError, match="too few for"):
            calibrate(llama_model, tokenizer, short, config, progress=False)
    batch = {"input_ids": torch.zeros(1, 65, dtype=torch.int64)}
    with pytest.raises(ConfigError, match="longer than the model's context of 64"):
        calibrate(llama(max_position_embeddings=64), tokenizer, batch, config, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        calibrate(llama_model.train(), tokenizer, text, config)


def test_every_level_and_round_reads_every_text(monkeypatch, llama_model, tokenizer):
    texts = [Text(name, "all", name * 9000) for name in "ab"]
    read: dict[tuple[str, float], set[str]] = {}
    decoder = llama_model.get_decoder()
    now = {}
    monkeypatch.setattr(
        _SparsePass, "levels", property(lambda _: [now], lambda _, some: now.update(*some)), raising=False
    )

    def watch(_, __, given):
        read.setdefault(now.get("model.layers.0.mlp", "dense"), set()).add(tokenizer.decode(given["input_ids"][0, :1]))

    hook = decoder.register_forward_pre_hook(watch, with_kwargs=True)
    calibrate(llama_model, tokenizer, texts, method("m-countdown", sparsity=0.5), tokens=32 * 512, progress=False)
    hook.remove()
    assert set(read) == {0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9}
    assert all(seen == {"a", "b"} for seen in read.values())


@pytest.mark.parametrize("config", ["m-countdown", "cats"])
def test_sequences_that_run_together_are_calibrated_as_one_by_one(config, monkeypatch, llama_model, tokenizer, text):
    config = method(config, sparsity=0.6, weighting="rms", allocation="global")
    ids = windows(tokenizer, text, count=9, length=32)

    def calibrated():
        shapes = []
        hook = llama_model.model.layers[2].register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:2]))
        profile = calibrate(llama_model, tokenizer, {"input_ids": ids}, config, progress=False)
        hook.remove()
        return profile.entries[0].sites, set(map(tuple, shapes))

    monkeypatch.setattr("countdown.memory.CPU_TOKENS", 32)
    alone, shapes = calibrated()
    assert shapes == {(1, 32)}
    monkeypatch.setattr("countdown.memory.CPU_TOKENS", 5 * 32)
    together, shapes = calibrated()
    assert (5, 32) in shapes
    for name, artifacts in alone.items():
        for artifact, value in artifacts.items():
            torch.testing.assert_close(together[name][artifact], value, rtol=2e-3, atol=1e-6)


def test_texts_and_strings_do_not_mix(llama_model, tokenizer, text):
    with pytest.raises(TextError, match="mixes strings with texts"):
        calibrate(llama_model, tokenizer, [Text("a", "all", text), text], method("cats"), progress=False)


def test_windows_are_spread_over_the_text(tokenizer):
    text = "".join(chr(97 + i) * 512 for i in range(20))
    rows = calibration_sequences(tokenizer, text, 5 * 512)
    assert [tokenizer.decode(row[:1]) for row in rows] == ["a", "e", "i", "m", "q"]


def test_provenance(model_folder, tokenizer, text):
    from countdown.loading import Source, load_model

    model = load_model(Source.parse(str(model_folder)), device="cpu")
    profile = calibrate(model, tokenizer, text, method("cats"), tokens=1024, progress=False)
    assert profile.base_model == {"name": "tiny-llama", "model_type": "llama"}
    assert profile.calibration["tokens"] == 1024
    assert profile.calibration["dtype"] == "float32"
    assert profile.entries[0].pattern == "*"


_MEMORY = """
import resource, torch
from tiny import byte_tokenizer, llama
from countdown.calibration.calibrate import calibrate, calibration_sequences
from countdown.methods import method

model, tokenizer = llama(intermediate_size=512, num_hidden_layers=4), byte_tokenizer()
text = "some words that do not matter " * 2300

def peak(tokens):
    calibrate(model, tokenizer, text, method("m-countdown", weighting="rms"), tokens=tokens, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

# a and u of 16k more tokens, kept, would take 16k x 4 layers x 2 x 512 x 4 bytes = 270 MB.
before = peak(8192)
print(peak(24576) - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not on Windows")
def test_memory_does_not_grow_with_the_text():
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
    )
    assert float(run.stdout) < 50


def test_the_importance_is_the_mean_square_of_the_dense_inputs(llama_model, tokenizer, text):
    inputs = []
    ffn = find_ffns(llama_model)[1]
    profile = calibrate(llama_model, tokenizer, text, method("d-proxy"), tokens=1024, progress=False)
    hook = ffn.module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0].double()))
    with torch.no_grad():
        for sequence in calibration_sequences(tokenizer, text, 1024):
            llama_model(sequence[None])
    hook.remove()
    expected = torch.cat(inputs).square().mean(dim=0).float()
    torch.testing.assert_close(profile.entries[0].sites[ffn.name]["importance"], expected)


@pytest.mark.parametrize("context, window, expected", [(96, None, 96), (96, 40, 40), (2048, None, 512)])
def test_windows_fit_the_models_context(context, window, expected, tokenizer, text):
    model = llama(max_position_embeddings=context)
    profile = calibrate(model, tokenizer, text, method("cats"), tokens=1024, window=window, progress=False)
    assert profile.calibration["window"] == expected
    assert profile.calibration["tokens"] == 1024 // expected * expected


def test_a_window_that_does_not_fit_is_said(tokenizer, text):
    with pytest.raises(ConfigError, match="window is 100, longer than the model's context of 96"):
        calibrate(llama(max_position_embeddings=96), tokenizer, text, method("cats"), window=100, progress=False)


def test_linears_that_read_one_input_share_norms_and_thresholds(tokenizer, text):
    model = llama()
    shared, own = (
        calibrate(model, tokenizer, text, method("teal", weighting=weighting), tokens=512, progress=False)
        .entries[0]
        .sites
        for weighting in ("shared-norm", "column-norm")
    )
    layer = model.model.layers[1]
    for parent, path, names in (
        (layer.self_attn, "self_attn", ["q_proj", "k_proj", "v_proj"]),
        (layer.mlp, "mlp", ["gate_proj", "up_proj"]),
        (layer.self_attn, "self_attn", ["o_proj"]),
    ):
        columns = torch.cat([getattr(parent, name).weight.detach().double() for name in names])
        found = [shared[f"model.layers.1.{path}.{name}"] for name in names]
        for artifacts in found:
            torch.testing.assert_close(artifacts["multipliers"].double(), columns.norm(dim=0))
            assert torch.equal(artifacts["thresholds"], found[0]["thresholds"])
    q, k = (own[f"model.layers.1.self_attn.{name}"]["multipliers"] for name in ("q_proj", "k_proj"))
    assert not torch.equal(q, k)


def test_a_shared_norm_is_one_active_set(tokenizer, text):
    model = llama()
    profile = calibrate(model, tokenizer, text, method("wina", sparsity=0.5), tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    attention = model.model.layers[1].self_attn
    x = torch.randn(3, model.config.hidden_size)
    assert torch.equal(attention.q_proj.active(x), attention.k_proj.active(x))
    assert torch.equal(attention.q_proj.active(x), attention.v_proj.active(x))


@pytest.mark.parametrize(
    "config, readings",
    [
        (method("cats"), ["thresholds of cats"]),
        (method("cats", weighting="rms"), ["second moments", "thresholds of cats × rms"]),
        (
            method("cats", allocation="global"),
            ["errors to allocate by", "effect of each module", "thresholds of cats, global"],
        ),
    ],
    ids=str,
)
def test_progress_says_which_reading_of_the_text_it_is(config, readings, llama_model, tokenizer, text, capsys):
    countdown.calibrate(llama_model, tokenizer, text, config, tokens=1024)
    done = [line for line in capsys.readouterr().err.splitlines() if line.endswith(": done")]
    count = len(readings)
    assert done == [f"calibrating ({n} of {count}), {reading}: done" for n, reading in enumerate(readings, 1)]
