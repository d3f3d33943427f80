"""Linear prediction of what an FFN drops: the least squares, what a sparse site adds, and the levels that it serves."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch

import countdown
from calls import arguments
from countdown.calibration.passes import Assignment
from countdown.calibration.passes import affine as affine_pass
from countdown.compensation import affine
from countdown.compensation.affine import Affine, shrinkage
from countdown.errors import ConfigError, ProfileError, TextError
from countdown.evaluation.evaluate import evaluate
from countdown.methods import method, parse_method
from countdown.modules import running, sparse_modules
from countdown.phase import PADDING, PROMPT
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe, RecipeEntry
from countdown.sites import find_sites
from countdown.sums._base import product_of
from countdown.text import windows
from countdown.weights import Plain
from countdown.weights.symmetric import Symmetric4, quantise
from tiny import llama

METHODS = ["m-countdown", "cats", "d-countdown", "d-proxy"]


def calibrated(model, tokenizer, text, name="m-countdown", **settings) -> Profile:
    config = method(name, **{"sparsity": 0.8, "compensate": "affine", **settings})
    return countdown.calibrate(model, tokenizer, text, config, tokens=8192, window=64, progress=False)


def sums(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    return ones.T @ ones, r.T @ ones


def test_least_squares_find_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    # Inputs that differ a hundredfold, as those of trained models.
    x = torch.randn(4000, 70, generator=generator) * torch.logspace(-1, 1, 70)
    matrix, bias = torch.randn(40, 70, generator=generator) / torch.logspace(-1, 1, 70), torch.randn(40)
    inputs, dropped = sums(x, x @ matrix.T + bias)
    found = affine.fits([0.5], inputs, [dropped], 1e-6)
    added = Affine.added(x, None, torch.ones(4000, 1, dtype=torch.bool), parts_of(found, 70, 40, 0.5))
    expected = shrinkage(0.5) * (x @ matrix.T + bias)
    # In 4 bits, of inputs in 8.
    assert (added - expected).norm() <= 0.1 * expected.norm()
    assert (added - expected).mean(0).norm() <= 0.02 * bias.norm()


@pytest.mark.parametrize(("sparsity", "share"), [(0.1, 0.7), (0.5, 0.7), (0.6, 0.85), (0.7, 1.0), (0.95, 1.0)])
def test_less_than_the_least_squares_is_taken_the_less_is_dropped(sparsity, share, monkeypatch):
    x = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0))
    inputs, dropped = sums(x, x[:, :5] + 3)
    matrix, _, bias = parts_of(affine.fits([sparsity], inputs, [dropped], 1.0), 24, 5, sparsity)
    monkeypatch.setattr(affine, "shrinkage", lambda _: 1.0)
    whole, _, whole_bias = parts_of(affine.fits([sparsity], inputs, [dropped], 1.0), 24, 5, sparsity)
    # Rounded to 4 bits apart from each other.
    assert float(matrix.values().norm() / whole.values().norm()) == pytest.approx(share, abs=0.03)
    torch.testing.assert_close(bias.values(), share * whole_bias.values())


def test_a_larger_ridge_predicts_less():
    x = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0))
    inputs, dropped = sums(x, x[:, :5] + 3)
    sizes = []
    for ridge in (0.01, 1.0, 100.0):
        matrix, _, bias = parts_of(affine.fits([0.5], inputs, [dropped], ridge), 24, 5, 0.5)
        sizes.append(float(matrix.values().norm()))
        # The mean is predicted whatever the ridge.
        torch.testing.assert_close(bias.values()[0], torch.full((5,), 3 * shrinkage(0.5)), atol=0.1, rtol=0)
    assert sizes[0] > 1.5 * sizes[1] > 20 * sizes[2]


def parts_of(found, d, outputs, sparsity):
    class Sum:  # as much of one as `make` looks at
        weights = (torch.empty(outputs, d),)

    sum_ = Sum()
    sum_.outputs = outputs
    return Affine(sparsity).make(sum_, found)


@pytest.mark.parametrize("name", METHODS)
def test_a_sparse_site_adds_it_to_sparse_tokens_alone(name, tokenizer, text):
    model = llama()
    x = torch.randn(1, 6, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    x[0, 4, 3] = torch.inf
    found = []
    for compensate in ("affine", "none"):
        # Exact counts drop the same with it and without.
        config = {"compensate": compensate, "decision": "topk"}
        countdown.sparsify_(model, calibrated(model, tokenizer, text, name, **config))
        site = model.model.layers[1].mlp
        phases = torch.tensor([0, PROMPT, 0, PADDING, 0, 0], dtype=torch.uint8)
        with torch.inference_mode():
            found.append(site.sparse(x, phases)[0])
        if compensate == "affine":
            matrix, channels, bias = (part.values() for part in site.added)
        countdown.restore_(model)
    steps = x[0] / channels
    expected = (steps * 127 / steps.abs().amax(-1, keepdim=True)).round() @ matrix.T
    expected = expected * steps.abs().amax(-1, keepdim=True) / 127 + bias
    difference = found[0] - found[1]
    for token in range(6):
        if token in (0, 2, 5):
            torch.testing.assert_close(difference[token], expected[token], atol=1e-5, rtol=1e-4)
        elif token != 4:  # not finite either way
            torch.testing.assert_close(found[0][token], found[1][token])


@pytest.mark.parametrize("name", METHODS)
def test_it_loses_less_on_text_that_was_not_read(name, tokenizer, text):
    model = llama()
    ids = windows(tokenizer, text[-20000:], count=48, length=64)
    lost = {}
    for compensate in ("none", "affine"):
        profile = calibrated(model, tokenizer, text[:-20000], name, sparsity=0.9, compensate=compensate)
        countdown.sparsify_(model, profile)
        lost[compensate] = evaluate(model, ids, protocol="all", progress=False).kl
        countdown.restore_(model)
    assert lost["affine"] < 0.9 * lost["none"]


def test_a_profile_serves_the_sparsities_at_and_above_each_fit(tokenizer, text, tmp_path):
    model = llama()
    profile = calibrated(model, tokenizer, text, sparsity=0.6)
    profile = Profile.load(profile.save(tmp_path / "p"))
    at = profile.entries[0].sites["model.layers.0.mlp"]["affine_at"]
    assert at.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.9])
    # Below all fits nothing is added, which is what `compensate` says then.
    taken = {}
    for sparsity in (0.0, 0.4, 0.5, 0.55, 0.6, 0.69, 0.75, 0.95):
        with pytest.warns(match="of 3 of 3 modules nothing is predicted") if sparsity == 0.4 else nullcontext():
            countdown.sparsify_(model, profile.with_settings(sparsity=sparsity))
        site = model.model.layers[0].mlp
        assert countdown.status(model)[0].compensation == ("affine" if site.added else "")
        matrices = profile.entries[0].sites["model.layers.0.mlp"]["affine_levels"]
        taken[sparsity] = None
        if site.added:
            taken[sparsity] = next(
                n for n, one in enumerate(matrices) if torch.equal(one, site.added[0].in_rows().parts[0])
            )
        assert site.method.compensate == ("none" if taken[sparsity] is None else "affine")
        countdown.restore_(model)
    assert list(taken.values()) == [None, None, 0, 0, 1, 1, 2, 3]


def test_what_was_fitted_for_others_is_refused(tokenizer, text):
    profile = calibrated(llama(), tokenizer, text)
    for settings in ({"decision": "topk"}, {"allocation": "global"}, {"ridge": 2.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} is part of a profile's calibration"):
            profile.with_settings(**settings)
    for before, after in (("affine", "none"), ("none", "affine")):
        with pytest.raises(ConfigError, match="compensate is part of a profile's calibration; calibrate again"):
            calibrated(llama(), tokenizer, text, compensate=before).with_settings(compensate=after)


def test_other_weights_are_refused(tokenizer, text):
    profile, other = calibrated(llama(), tokenizer, text), llama()
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight.mul_(1.5)
    with pytest.raises(ProfileError, match="what it predicts of dropped neurons is theirs: calibrate on this model"):
        countdown.sparsify_(other, profile)


def test_bytes_are_counted(tokenizer, text):
    model = llama()
    read = {}
    for compensate in ("none", "affine"):
        profile = calibrated(model, tokenizer, text, compensate=compensate, decision="topk")
        countdown.sparsify_(model, profile)
        with running(model, "all"), torch.inference_mode():
            model(torch.arange(3, 40)[None])
        (site, *_) = countdown.status(model)
        read[compensate] = site.weights_read, site.beside_bytes
        countdown.restore_(model)
    size = model.config.hidden_size
    nbytes = Symmetric4.bytes_of(size, size) + 4 * 2 * size
    assert read["none"][1] == 0
    # Kernels for CPUs read tiles of 16 rows, the last of them filled up.
    in_tiles = Symmetric4.bytes_of(-(-size // 16) * 16, size) + 4 * 2 * size
    assert read["affine"][1] in (nbytes, in_tiles)
    assert read["affine"][0] - read["none"][0] == pytest.approx(nbytes / (4 * site.size), rel=1e-6)


@pytest.mark.parametrize("name", ["m-countdown", "d-countdown", "d-proxy"])
def test_thresholds_are_those_with_it_in_place(name, tokenizer, text):
    """What later layers see is then not what it was without."""
    model = llama(num_hidden_layers=12)
    countdown.sparsify_(model, calibrated(model, tokenizer, text, name, sparsity=0.9, decision="threshold"))
    evaluate(model, windows(tokenizer, text, count=120, length=64), protocol="all", progress=False)
    assert [site.realised_sparsity for site in countdown.status(model)] == pytest.approx([0.9] * 12, abs=0.01)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_sites_are_read_in_groups_where_memory_is_short(allocation, tokenizer, text, monkeypatch, capsys):
    def found():
        config = method("m-countdown", sparsity=0.6, compensate="affine", allocation=allocation)
        return countdown.calibrate(llama(), tokenizer, text, config, tokens=1024, window=64)

    def last_reading(said):
        return re.findall(r"calibrating \((\d+) of (\d+)\)", said)[-1]

    whole = found()
    said = capsys.readouterr().err
    (count, _) = last_reading(said)
    assert "predicting what is dropped: sums take 0.00 GB beside the model's weights\n" in said
    # Room for the sums of two of three sites: with a 1, 25 inputs and 24 outputs at 4 sparsities each.
    weights = sum(parameter.nbytes for parameter in llama().parameters())
    monkeypatch.setattr(affine_pass, "memory_of", lambda _: weights + 2 * 2 * 4 * 25 * (25 + 4 * 24))
    parts = found()
    said = capsys.readouterr().err
    assert "beside the model's weights, in 2 readings of the text\n" in said
    assert last_reading(said) == (str(int(count) + 1), str(int(count) + 1))
    for name, artifacts in whole.entries[0].sites.items():
        for key, tensor in artifacts.items():
            assert torch.equal(tensor, parts.entries[0].sites[name][key]), (name, key)


def test_too_little_text_says_how_much_it_takes(tokenizer, text):
    model = llama()
    with pytest.raises(TextError, match=r"the text has 32 tokens, and to predict from 24 inputs .* takes 48 at least"):
        countdown.calibrate(
            model, tokenizer, text, method("m-countdown", compensate="affine"), tokens=32, window=32, progress=False
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compensate": "linear"}, "compensate of m-countdown is 'linear', expected one of: none, affine"),
        ({"ridge": 0}, "ridge of m-countdown is 0, expected 0.0001 to 1000"),
        ({"ridge": float("nan")}, "ridge of m-countdown is nan"),
        ({"ridge": "much"}, "ridge of m-countdown is much"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        method("m-countdown", **settings)


def test_methods_of_linears_have_none():
    with pytest.raises(ConfigError, match="has no field 'compensate'"):
        method("teal", compensate="affine")


def test_settings_of_older_profiles_are_as_published():
    assert parse_method({"name": "m-countdown", "version": 1, "sparsity": 0.5}).compensate == "none"


def test_a_damaged_fit_is_refused(tokenizer, text, tmp_path):
    profile = calibrated(llama(), tokenizer, text)
    site = profile.entries[0].sites["model.layers.0.mlp"]
    site["affine_at"] = site["affine_at"].flip(0)
    with pytest.raises(ProfileError, match=r"affine_at of model.layers.0.mlp do not ascend between 0 and 1"):
        Profile.load(profile.save(tmp_path / "p"))


DAMAGE = {
    "affine_at": lambda at: at[:2],
    "affine_levels": lambda levels: levels[:, :, :4],
    "affine_scales": lambda scales: scales[:, :5],
    "affine_bias": lambda bias: bias[:, :3],
    "affine_channels": lambda channels: channels * 0 + 1e-30,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_fits_that_do_not_fit_each_other_are_refused(name, tokenizer, text, tmp_path):
    profile = calibrated(llama(), tokenizer, text)
    site = profile.entries[0].sites["model.layers.0.mlp"]
    site[name] = DAMAGE[name](site[name]).contiguous()
    with pytest.raises(ProfileError, match=f"{name}|affine fits differ in number or size"):
        Profile.load(profile.save(tmp_path / "p"))


@pytest.mark.parametrize("sparsity", [0.5 + 0.1 * 4 - 1e-16, 0.7 + 1e-9, 0.9000000001, 0.9999999, 1e-12])
def test_sparsities_that_are_nearly_those_of_other_fits(sparsity, tokenizer, text, tmp_path):
    model = llama()
    profile = Profile.load(calibrated(model, tokenizer, text, sparsity=sparsity).save(tmp_path / "p"))
    if sparsity > 0.5:
        countdown.sparsify_(model, profile)
        assert model.model.layers[0].mlp.method.compensate == "affine"


def test_in_a_recipe_only_some_methods_have_it(tokenizer, text):
    model = llama()
    attention = RecipeEntry(method("teal"), "*.self_attn.*")
    recipe = Recipe((RecipeEntry(method("d-proxy", compensate="affine")), attention)).with_settings(sparsity=0.6)
    profile = countdown.calibrate(model, tokenizer, text, recipe, tokens=2048, window=64, progress=False)
    countdown.sparsify_(model, profile)
    assert {site.compensation for site in countdown.status(model)} == {"affine", ""}
    assert Recipe.named("d-proxy+wina", compensate="affine").entries[0].method.compensate == "affine"
    with pytest.raises(ConfigError, match="'teal' has no field 'compensate'"):
        Recipe.named("teal", compensate="none")


def test_tokens_with_small_outputs_are_not_disturbed(tokenizer, text):
    """What normalises the output of an FFN makes a large one of a small one, errors included."""
    model = llama()
    (site, *_) = find_sites(model, ["ffn"])
    one = Assignment(site, method("m-countdown", sparsity=0.7, compensate="affine"))
    sums = affine_pass._Sums(one, [0.7])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator) + 2
    # One token in a hundred has next to no output.
    x[::100] = 0.03 * torch.randn(24, generator=generator)
    with torch.inference_mode():
        sums.add(site.sum, x, factors := site.sum.project(x))
    added = Affine.added(x[::100], None, torch.ones(4, 1, dtype=torch.bool), Affine(0.7).make(site.sum, sums.fits()))
    y = site.sum.combine(product_of(factors)[::100])
    assert added.norm() < 2 * y.norm()


def test_inputs_that_the_text_leaves_at_nothing(tokenizer, text):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = 0
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    countdown.sparsify_(model, calibrated(model, tokenizer, text))
    matrix, channels, bias = (part.values() for part in model.model.layers[0].mlp.added)
    x = torch.randn(1, 24, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 0
    before = (x / channels) @ matrix.T + bias
    x[0, 3] = 1
    # What was never seen changes little.
    assert ((x / channels) @ matrix.T + bias - before).norm() <= before.norm()


@pytest.mark.parametrize("format_", ["plain", "symmetric-3"])
def test_an_op_takes_no_other_format(format_):
    weights = [torch.randn(9, 8), torch.randn(9, 8), torch.randn(8, 9)]
    matrix = Plain([torch.randn(8, 8)]) if format_ == "plain" else quantise(torch.randn(8, 8), torch.ones(8), 3)
    added = [matrix, Plain([torch.ones(1, 8)]), Plain([torch.ones(1, 8)])]
    tensors, options = arguments(torch.randn(1, 8), weights, [None] * 3, activation="silu", added=added)
    counters = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"L is in format '{format_}', expected symmetric-4"):
        torch.ops.countdown.sparse(*tensors, torch.zeros(9), counters, None, **options)


def test_what_is_made_under_inference_mode_serves_outside_of_it(tokenizer, text):
    model = llama()
    with torch.inference_mode():
        countdown.sparsify_(model, calibrated(model, tokenizer, text))
    for site in sparse_modules(model).values():
        assert not any(tensor.is_inference() for part in site.added for tensor in part.parts)
        # Nothing is held of the fits for other sparsities.
        assert not any(name.startswith("affine") for name in site._artifacts)


def test_it_stays_with_its_model_when_that_is_cast(tokenizer, text):
    model = llama()
    countdown.sparsify_(model, calibrated(model, tokenizer, text))
    before = [part.parts[0].clone() for part in model.model.layers[0].mlp.added]
    model.bfloat16()
    for site in sparse_modules(model).values():
        assert [part.parts[0].dtype for part in site.added] == [torch.uint8, torch.float32, torch.float32]
    assert all(
        torch.equal(one, part.parts[0]) for one, part in zip(before, model.model.layers[0].mlp.added, strict=True)
    )
