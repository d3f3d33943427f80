"""One budget over several entries of a recipe: bytes, whatever the methods."""

from __future__ import annotations

import pytest
import torch

import countdown
from countdown.allocation.global_budget import allocate
from countdown.artifacts import ERRORS
from countdown.calibration.calibrate import calibrate
from countdown.cost import saved_bytes
from countdown.errors import ConfigError
from countdown.methods import method, named
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe, RecipeEntry
from countdown.sites import find_sites
from countdown.text import windows
from tiny import llama

TOKENS = 2048
# A hidden size at which a proxy takes no whole group in vain.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def one_budget(*entries, sparsity=0.5, allocation="global"):
    return Recipe(
        tuple(RecipeEntry(method(name, sparsity=sparsity, allocation=allocation), p) for name, p in entries), allocation
    )


MIXED = one_budget(("m-countdown", "*.mlp"), ("wina", "*.self_attn.*"))


@pytest.fixture(scope="module")
def made(tokenizer, text):
    return {
        recipe: calibrate(llama(**SIZES), tokenizer, text, recipe, tokens=TOKENS, progress=False)
        for recipe in (MIXED, Recipe.named("d-proxy+wina"))
    }


def read(model, profile):
    """The bytes that the sparse modules of a token read at their targets, by module."""
    sites = {site.name: site for site in find_sites(model, ["ffn", "linear"])}
    countdown.sparsify_(model, profile)
    found = {s.name: s for s in countdown.status(model)}
    countdown.restore_(model)
    entries = {name: entry.method.selector for entry in profile.entries for name in entry.sites}
    return {n: entries[n].bytes_read(sites[n].sum, [1 - s.target_sparsity]) for n, s in found.items()}, found


def test_what_is_saved_are_bytes_of_what_only_active_terms_need():
    ffn = find_sites(llama(), ["ffn"])[0]
    matrix = 24 * 53 * 4
    assert saved_bytes(ffn, method("m-countdown")) == 2 * matrix
    assert saved_bytes(ffn, method("d-countdown")) == matrix
    assert saved_bytes(ffn, method("d-proxy")) == 3 * matrix
    k = next(site for site in find_sites(llama(torch.bfloat16), ["linear"]) if site.name.endswith("k_proj"))
    assert saved_bytes(k, method("wina")) == 24 * 12 * 2


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("sparsity", [None, 0.3, 0.7])
def test_the_bytes_are_those_of_every_module_at_the_sparsity(place, sparsity, made, tmp_path):
    profile = list(made.values())[place]
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    if sparsity is not None:
        loaded = loaded.with_settings(sparsity=sparsity)
    model = llama(**SIZES)
    spent, sites = read(model, loaded)
    uniform, _ = read(model, loaded.with_settings(allocation="uniform"))
    assert set(sites) == {s.name for s in find_sites(model, ["ffn"])} | {
        s.name for s in find_sites(model, ["linear"]) if ".self_attn." in s.name
    }
    assert sum(spent.values()) == pytest.approx(sum(uniform.values()), rel=2e-3)
    # One budget, not one for each.
    moved = sum(b for n, b in spent.items() if "mlp" in n) / sum(b for n, b in uniform.items() if "mlp" in n)
    assert abs(moved - 1) > 5e-3
    assert {site.allocation for site in sites.values()} == {"global"}


def test_a_byte_is_spent_where_it_costs_least(made):
    profile = made[MIXED]
    model = llama(**SIZES)
    _, sites = read(model, profile)
    curves = {name: found[ERRORS.name] for entry in profile.entries for name, found in entry.sites.items()}

    def slope(names, at):
        """Estimated loss a byte saved at a sparsity, a little below and above."""
        saved = sum(bytes_[name] for name in names)
        ends = (max(at - 0.03, 0), min(at + 0.03, 0.95))
        low, high = (sum(float(curves[name][int(k * 1000)]) for name in names) for k in ends)
        return (high - low) / (ends[1] - ends[0]) / saved

    bytes_ = {
        site.name: saved_bytes(site, method("m-countdown" if site.kind == "ffn" else "wina"))
        for site in find_sites(model, ["ffn", "linear"])
    }
    groups = [[f"model.layers.{i}.mlp"] for i in range(3)]
    groups += [[f"model.layers.{i}.self_attn.{p}_proj" for p in "qkv"] for i in range(3)]
    inside = [g for g in groups if 0.1 < sites[g[0]].target_sparsity < 0.9]
    prices = [slope(group, sites[group[0]].target_sparsity) for group in inside]
    assert len({name.rpartition(".")[2] for group in inside for name in group}) > 1
    assert max(prices) < 1.7 * min(prices)


def test_prices_are_of_bytes():
    # The same error for half of the bytes: it is dearer by the byte, and gets less sparsity.
    grid = torch.arange(1000) / 1000
    found = allocate(torch.stack([grid**2, grid**2]), torch.tensor([2, 1]), 0.5)
    assert found[0] > found[1]


def test_thresholds_of_both_hold_when_both_are_sparse(tokenizer, text):
    model = llama(**SIZES)
    profile = calibrate(model, tokenizer, text, MIXED, tokens=8192, progress=False)
    countdown.sparsify_(model, profile, apply_to="all")
    with torch.no_grad():
        model(windows(tokenizer, text, count=16))
    for site in countdown.status(model):
        assert site.realised_sparsity == pytest.approx(site.target_sparsity, abs=0.08)


def test_two_entries_do_not_take_one_linear(tokenizer, text):
    first = one_budget(("m-countdown", "*"), ("teal", "*.gate_proj"))
    with pytest.raises(ConfigError, match=r"^pattern '\*\.gate_proj' takes no module .* earlier entries took all"):
        calibrate(llama(), tokenizer, text, first, tokens=512, progress=False)
    last = one_budget(("teal", "*.gate_proj"), ("m-countdown", "*"))
    with pytest.raises(ConfigError, match=r"^'\*' takes model\.layers\.0\.mlp, but an earlier entry took its part"):
        calibrate(llama(), tokenizer, text, last, tokens=512, progress=False)
    beyond = one_budget(("m-countdown", "*"), ("teal", "*.layers.3.self_attn.*"))
    with pytest.raises(ConfigError, match=r"^pattern '\*\.layers\.3\.self_attn\.\*' takes no module of the model"):
        calibrate(llama(), tokenizer, text, beyond, tokens=512, progress=False)


def test_settings_change_all_entries(made):
    profile = made[MIXED]
    assert profile.recipe == MIXED
    changed = profile.with_settings(sparsity=0.2)
    assert {entry.method.sparsity for entry in changed.entries} == {0.2}
    assert changed.recipe.allocation == "global"
    assert profile.with_settings(allocation="uniform").recipe.allocation == "uniform"
    assert "one budget, global, at 0.5" in repr(profile)
    with pytest.raises(ConfigError, match=r"sparsity of m-countdown is 1\.5"):
        profile.with_settings(sparsity=1.5)
    with pytest.raises(ConfigError, match="allocation of m-countdown is 'greedy'"):
        profile.with_settings(allocation="greedy")


def test_the_named_recipe_is_what_its_name_says():
    found = Recipe.named("d-proxy+wina", sparsity=0.4)
    assert named("d-proxy+wina").allocation == found.allocation == "global"
    assert [entry.method for entry in found.entries] == [
        method("d-proxy", sparsity=0.4, allocation="global"),
        method("wina", sparsity=0.4, allocation="global"),
    ]
    assert Recipe.named("d-proxy+wina", allocation="uniform").allocation == "uniform"
