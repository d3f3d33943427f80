"""R-Sparse's budget and its low-rank term, against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

import countdown
from countdown.compensation import kept, rank
from countdown.compensation.svd import DroppedSvd, truncated
from countdown.cost import weights_read
from countdown.errors import ConfigError
from countdown.evaluation.evaluate import evaluate
from countdown.methods import method, parse_method
from countdown.profiles.profile import Profile
from countdown.sites.linear import find_linears
from countdown.sums.linear import Linear
from countdown.text import windows
from countdown.weights import Plain
from tiny import llama


def calibrated(model, tokenizer, text, **settings) -> Profile:
    return countdown.calibrate(
        model, tokenizer, text, method("r-sparse", **settings), tokens=2048, window=64, progress=False
    )


def logits(model, tokenizer, text) -> torch.Tensor:
    with torch.inference_mode():
        return model(windows(tokenizer, text, count=1, length=32)).logits


@pytest.mark.parametrize(
    "d, outputs, sparsity, alpha, channels, expected",
    [
        (4096, 4096, 0.5, 1.0, 2048, 0),
        (4096, 4096, 0.5, 0.98, 2007, 20),
        (4096, 1024, 0.5, 0.98, 2007, 8),  # k and v of grouped attention are narrower than q
        (4096, 14336, 0.5, 0.9, 1843, 159),
        (100, 100, 0.71, 1.0, 29, 0),  # 0.29 · 100 is 28.999999999999996
        (24, 53, 0.0, 0.0, 0, 16),
    ],
)
def test_the_budget_is_spent_as_published(d, outputs, sparsity, alpha, channels, expected):
    assert kept(d, sparsity, alpha) == channels
    assert rank(d, outputs, sparsity, alpha) == expected
    assert channels * outputs + expected * (d + outputs) <= (1 - sparsity) * d * outputs + 1e-6


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (33, 33)], ids=str)
def test_the_truncated_product_is_the_best_of_its_rank(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(weight.double())
    for size in (0, 1, 7, 30):
        inner, outer = truncated(weight, size)
        expected = (u[:, :size] * s[:size]) @ v[:size]
        assert (inner.shape, outer.shape) == ((size, shape[1]), (shape[0], size))
        assert float((outer @ inner - expected).norm()) <= 1e-10 * float(weight.norm())


def test_parts_of_a_higher_sparsity_are_cut_from_those_of_a_lower():
    generator = torch.Generator().manual_seed(0)
    sum_ = Linear([Plain([torch.randn(48, 64, generator=generator)])], [None])
    wide = DroppedSvd(0.0, 0.5)
    cut = DroppedSvd(0.6, 0.5).cut(sum_, wide.make(sum_, {}))
    for one, other in zip(cut, DroppedSvd(0.6, 0.5).make(sum_, {}), strict=True):
        assert torch.equal(one.values(), other.values())


def test_with_alpha_1_it_is_teal(tokenizer, text):
    model = llama(torch.bfloat16)
    teal = countdown.calibrate(model, tokenizer, text, method("teal"), tokens=2048, window=64, progress=False)
    found = []
    for profile in (teal, calibrated(model, tokenizer, text)):
        countdown.sparsify_(model, profile, apply_to="all")
        found.append(logits(model, tokenizer, text))
        countdown.restore_(model)
    assert torch.equal(*found)


def test_with_nothing_dropped_it_is_dense(tokenizer, text):
    model = llama(torch.bfloat16)
    dense = logits(model, tokenizer, text)
    profile = calibrated(model, tokenizer, text).with_settings(sparsity=0.0)
    countdown.sparsify_(model, profile, apply_to="all")
    assert torch.equal(logits(model, tokenizer, text), dense)


@pytest.mark.parametrize("decision", ["threshold", "topk"])
def test_with_alpha_0_the_truncated_product_is_all_there_is(decision, tokenizer, text):
    model = llama(torch.float32)
    profile = calibrated(model, tokenizer, text, alpha=0.0, decision=decision)
    expected = llama(torch.float32)
    with torch.no_grad():
        for site in find_linears(expected):
            weight = site.module.weight
            inner, outer = truncated(weight, rank(weight.shape[1], weight.shape[0], 0.5, 0.0))
            weight.copy_(outer @ inner)
    countdown.sparsify_(model, profile, apply_to="all")
    found, wanted = logits(model, tokenizer, text), logits(expected, tokenizer, text)
    assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.5])
def test_realised_sparsity_and_bytes_follow_the_formula(alpha, tokenizer, text):
    model = llama(torch.float32)
    profile = calibrated(model, tokenizer, text, alpha=alpha, sparsity=0.4, decision="topk")
    countdown.sparsify_(model, profile)
    evaluate(model, windows(tokenizer, text, count=2, length=64), progress=False)
    for one in countdown.status(model):
        weight = model.get_submodule(one.name).weight
        outputs, d = weight.shape
        c, r = kept(d, 0.4, alpha), rank(d, outputs, 0.4, alpha)
        assert one.realised_sparsity == pytest.approx(1 - c / d)
        assert one.weights_read == pytest.approx((c * outputs + r * (d - c + outputs)) / (d * outputs))
        assert one.beside_bytes == 4 * 16 * math.ceil(r / 16) * (d + outputs)  # rows begin at multiples of 16 entries


def test_thresholds_are_calibrated_with_the_low_rank_term_in_place(tokenizer, text):
    model = llama(torch.float32)
    profile = calibrated(model, tokenizer, text, alpha=0.7, sparsity=0.6)
    countdown.sparsify_(model, profile)
    evaluate(model, windows(tokenizer, text, count=16, length=64), progress=False)
    every = [one.realised_sparsity for one in countdown.status(model)]
    assert sum(every) / len(every) == pytest.approx(1 - 0.7 * 0.4, abs=0.02)


def test_alpha_by_linear_survives_and_reaches_each(tokenizer, text, tmp_path):
    model = llama(torch.float32)
    alphas = {"*.q_proj": 0.5, "model.layers.1.mlp.*": 0.9, "*": 1.0}
    config = method("r-sparse", alpha=alphas, sparsity=0.3)
    assert parse_method(config.to_dict()) == config
    profile = calibrated(model, tokenizer, text, alpha=alphas, sparsity=0.3)
    countdown.sparsify_(model, Profile.load(profile.save(tmp_path / "p")))
    found = {one.name: module.method.own_alpha for one, module in _modules(model)}
    assert found["model.layers.0.self_attn.q_proj"] == 0.5
    assert found["model.layers.1.mlp.up_proj"] == 0.9
    assert found["model.layers.0.mlp.up_proj"] == 1.0
    assert weights_read(find_linears(llama()), config) < 1


def _modules(model):
    return [(one, model.get_submodule(one.name)) for one in countdown.status(model)]


def test_casts_and_loaded_weights_are_followed(tokenizer, text):
    model, other = llama(torch.float32), llama(torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    countdown.sparsify_(model, calibrated(model, tokenizer, text, alpha=0.5))
    model.load_state_dict(other.state_dict())
    model.to(torch.bfloat16)
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert {part.values().dtype for part in module.added} == {torch.bfloat16}
    weight = other.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    inner, outer = truncated(weight, rank(*reversed(weight.shape), 0.5, 0.5))
    made = module.added[1].values().double() @ module.added[0].values().double()
    assert float((made - outer @ inner).norm()) <= 0.02 * float(weight.norm())


@pytest.mark.parametrize(
    "alpha, said",
    [
        (1.5, "0 ≤ alpha ≤ 1"),
        (-0.1, "0 ≤ alpha ≤ 1"),
        (True, "0 ≤ alpha ≤ 1"),
        ("0.9", "0 ≤ alpha ≤ 1"),
        ({"*": 2}, "0 ≤ alpha ≤ 1"),
        ([0.5], "a mapping from names to numbers"),
    ],
)
def test_alpha_out_of_range_is_refused(alpha, said):
    with pytest.raises(ConfigError, match=said):
        method("r-sparse", alpha=alpha)


@pytest.mark.parametrize(
    "alphas, said",
    [
        ({"model.layers.0.*": 0.5}, "given for some linears, not for model.layers.1"),
        ({"model.layers.31.self_attn.q_proj": 0.5, "*": 1.0}, "was it found for another model"),
    ],
)
def test_alpha_of_another_model_is_refused(alphas, said, tokenizer, text):
    with pytest.raises(ConfigError, match=said):
        calibrated(llama(), tokenizer, text, alpha=alphas)


def test_the_released_form_can_be_written():
    """As many numbers as Llama-3-8B has linears: 7 in each of 32 layers, most of them 1."""
    roles = [*(f"self_attn.{one}_proj" for one in "qkvo"), *(f"mlp.{one}_proj" for one in ("gate", "up", "down"))]
    names = [f"model.layers.{layer}.{role}" for layer in range(32) for role in roles]
    alphas = {name: 0.9 if place % 7 == 0 else 1.0 for place, name in enumerate(names)}
    config = method("r-sparse", alpha=alphas, sparsity=0.5)
    config.check_sites(names)
    assert [config.at(name, 0.5).own_alpha for name in names] == list(alphas.values())
    assert len(config.to_dict()["alpha"]) == 224
    assert str(config) == "r-sparse, α 0.9 to 1 by linear, threshold at 0.5"
