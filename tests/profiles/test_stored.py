"""Weights that are derived and stored with a profile: they are used where they fit, and made anew where they do not."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import countdown
from countdown.compensation import svd
from countdown.errors import ConfigError, ProfileError
from countdown.methods import method
from countdown.modules import sparse_modules
from countdown.profiles.profile import FILES, Profile
from countdown.profiles.recipe import Recipe, RecipeEntry
from countdown.profiles.stored import FILE
from countdown.weights import symmetric
from tiny import llama

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])
PROXY = method("d-proxy", sparsity=0.6)
# Half of the budget, so that low ranks of these small linears are more than 0; one linear has none.
LOW_RANK = method("r-sparse", alpha={"*.v_proj": 1.0, "*": 0.5}, sparsity=0.4)
MIXED = Recipe((RecipeEntry(PROXY), RecipeEntry(LOW_RANK, "*.self_attn.*")))
EVERY = {"proxy": PROXY, "low rank": LOW_RANK, "both": MIXED}
NOT_FITTING = "derived weights that are stored do not fit"


def calibrated(model, tokenizer, text, config=PROXY):
    return countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)


@pytest.fixture(params=EVERY.values(), ids=EVERY)
def profile(request, llama_model, tokenizer, text):
    return calibrated(llama_model, tokenizer, text, request.param)


@pytest.fixture
def stored(llama_model, profile, tmp_path):
    return profile.with_derived(llama_model).save(tmp_path / "p")


@pytest.fixture
def low_ranks(llama_model, tokenizer, text):
    return calibrated(llama_model, tokenizer, text, LOW_RANK)


@pytest.fixture
def nothing_is_made(monkeypatch):
    """Called, it lets nothing be made from then on."""

    def forbid():
        monkeypatch.setattr(symmetric, "quantise", None)
        monkeypatch.setattr(svd, "truncated", None)

    return forbid


def tensors(module):
    return [tensor for part in (*module.parts, *module.added) for tensor in part.parts]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def sparse_logits(model, profile):
    """Of a model that is dense before and after."""
    countdown.sparsify_(model, profile, apply_to="all")
    found = logits(model)
    countdown.restore_(model)
    return found


def test_what_is_stored_is_used_and_gives_the_same(llama_model, profile, stored, nothing_is_made):
    countdown.sparsify_(llama_model, profile, apply_to="all")
    expected = logits(llama_model)
    made = {name: tensors(module) for name, module in sparse_modules(llama_model).items()}
    countdown.restore_(llama_model)
    nothing_is_made()
    countdown.sparsify_(llama_model, Profile.load(stored), apply_to="all")
    for name, module in sparse_modules(llama_model).items():
        assert all(torch.equal(one, other) for one, other in zip(made[name], tensors(module), strict=True))
    assert torch.equal(logits(llama_model), expected)


def test_a_recipe_stores_what_each_of_its_methods_derives(llama_model, tokenizer, text):
    found = calibrated(llama_model, tokenizer, text, MIXED).with_derived(llama_model).derived.made
    proxies = {f"model.layers.{layer}.mlp/selector" for layer in range(3)}
    low_ranks = {f"model.layers.{layer}.self_attn.{one}_proj/compensation" for layer in range(3) for one in "qko"}
    assert set(found) == proxies | low_ranks


def test_low_ranks_of_a_higher_sparsity_are_those_of_a_lower(llama_model, low_ranks, nothing_is_made):
    stored = low_ranks.with_derived(llama_model).with_settings(sparsity=0.7)
    expected = sparse_logits(llama_model, low_ranks.with_settings(sparsity=0.7))
    nothing_is_made()
    assert torch.equal(sparse_logits(llama_model, stored), expected)


def test_low_ranks_of_a_lower_sparsity_are_made_anew(llama_model, low_ranks):
    stored = low_ranks.with_derived(llama_model).with_settings(sparsity=0.1)
    with pytest.warns(countdown.ProfileWarning, match=NOT_FITTING):
        found = sparse_logits(llama_model, stored)
    assert torch.equal(found, sparse_logits(llama_model, low_ranks.with_settings(sparsity=0.1)))


@pytest.mark.parametrize("alpha, made_anew", [(0.3, True), (0.7, False)])
def test_low_ranks_of_another_alpha_serve_where_they_are_enough(
    alpha, made_anew, llama_model, tokenizer, text, low_ranks, stored_elsewhere, recwarn
):
    other = calibrated(
        llama_model, tokenizer, text, method("r-sparse", alpha={"*.v_proj": 1.0, "*": alpha}, sparsity=0.4)
    )
    expected = sparse_logits(llama_model, other)
    found = sparse_logits(llama_model, stored_elsewhere(low_ranks, other))
    assert torch.equal(found, expected)
    assert made_anew == any(NOT_FITTING in str(one.message) for one in recwarn)


@pytest.fixture
def stored_elsewhere(llama_model, tmp_path):
    """Called with two profiles, return the second with what the first would store."""

    def move(source, target):
        file = source.with_derived(llama_model).save(tmp_path / "source") / FILE
        file.rename(target.save(tmp_path / "target") / FILE)
        return Profile.load(tmp_path / "target")

    return move


def test_other_weights_that_are_loaded_make_others(llama_model, stored):
    countdown.sparsify_(llama_model, Profile.load(stored))
    module = next(module for module in sparse_modules(llama_model).values() if tensors(module))
    before = [part.clone() for part in tensors(module)]
    llama_model.load_state_dict({key: -2 * value for key, value in llama_model.state_dict().items()})
    assert not torch.equal(before[0], tensors(module)[0])


def test_what_is_of_other_weights_is_made_anew(llama_model, profile, stored):
    with torch.no_grad():
        for name in ("mlp.up_proj", "self_attn.q_proj"):
            llama_model.model.layers[1].get_submodule(name).weight[5] += 1e-3
    with pytest.warns(countdown.ProfileWarning, match=NOT_FITTING) as caught:
        found = sparse_logits(llama_model, Profile.load(stored))
    assert len(caught) == 1
    assert torch.equal(sparse_logits(llama_model, profile), found)


def test_what_has_another_shape_is_made_anew(llama_model, profile, stored):
    loaded = Profile.load(stored)
    for key in [key for key in loaded.derived.tensors if key.endswith(("/0/levels", "/0/values"))]:
        loaded.derived.tensors[key] = loaded.derived.tensors[key][:, :-1]
    with pytest.warns(countdown.ProfileWarning, match=NOT_FITTING):
        found = sparse_logits(llama_model, loaded)
    assert torch.equal(sparse_logits(llama_model, profile), found)


def test_what_lacks_a_tensor_is_made_anew(llama_model, profile, stored):
    loaded = Profile.load(stored)
    del loaded.derived.tensors[min(loaded.derived.tensors)]
    with pytest.warns(countdown.ProfileWarning, match=NOT_FITTING):
        found = sparse_logits(llama_model, loaded)
    assert torch.equal(sparse_logits(llama_model, profile), found)


def test_a_saved_model_of_another_dtype_loads(llama_model, stored, tmp_path):
    countdown.sparsify_(llama_model, Profile.load(stored))
    llama_model.bfloat16().save_pretrained(tmp_path / "model")
    with pytest.warns(countdown.ProfileWarning, match=NOT_FITTING):
        assert sparse_modules(countdown.from_pretrained(str(tmp_path / "model")))


def test_low_ranks_have_the_dtype_that_they_would_be_made_in(tokenizer, text):
    # Weights have the same values in both.
    short = llama(torch.bfloat16)
    stored = calibrated(short, tokenizer, text, LOW_RANK).with_derived(short)
    wide = llama(torch.bfloat16).float()
    with pytest.warns(countdown.ProfileWarning, match=NOT_FITTING):
        countdown.sparsify_(wide, stored)
    rounded = wide.model.layers[0].self_attn.q_proj.added[1].values()
    assert not torch.equal(rounded, rounded.bfloat16().float())


def test_proxies_of_another_calibration_are_made_anew(llama_model, tokenizer, text, stored_elsewhere):
    first, other = (calibrated(llama_model, tokenizer, some) for some in (text, "another text. " * 500))
    with pytest.warns(countdown.ProfileWarning, match=NOT_FITTING):
        countdown.sparsify_(llama_model, stored_elsewhere(first, other))


def test_whoever_may_read_the_profile_may_read_what_is_stored(stored):
    assert (stored / FILE).stat().st_mode == (stored / FILES[1]).stat().st_mode


def test_a_damaged_file_is_refused(stored):
    (stored / FILE).write_bytes((stored / FILE).read_bytes()[:100])
    again = re.escape(f"Make it again: countdown calibrate MODEL -o {stored} --overwrite")
    with pytest.raises(ProfileError, match=rf"is damaged: .*\. {again}$"):
        Profile.load(stored)


@pytest.mark.parametrize("made", ["[]", '"text"', '{"model.layers.1.mlp/selector": 3}', '{"x": {"hash": "0"}}', "{"])
def test_a_file_that_does_not_say_what_it_holds_is_refused(made, stored):
    save_file(load_file(stored / FILE), stored / FILE, {"made": made})
    with pytest.raises(ProfileError, match=r"is damaged: .*Make it again"):
        Profile.load(stored)


def test_a_profile_with_derived_weights_may_be_overwritten(profile, stored):
    profile.save(stored, overwrite=True)
    assert not (stored / FILE).exists()


@pytest.mark.parametrize("config", [method("cats"), method("r-sparse", alpha=1.0)], ids=str)
def test_without_derived_weights_there_are_none_to_store(config, llama_model, tokenizer, text):
    with pytest.raises(ConfigError, match="no method of this profile derives weights"):
        calibrated(llama_model, tokenizer, text, config).with_derived(llama_model)


def test_saving_a_sparsified_model_keeps_what_is_stored(llama_model, stored, tmp_path, nothing_is_made):
    countdown.sparsify_(llama_model, Profile.load(stored), apply_to="all")
    expected = logits(llama_model)
    llama_model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "countdown" / FILE).is_file()
    nothing_is_made()
    loaded = countdown.from_pretrained(str(tmp_path / "model"), apply_to="all")
    assert torch.equal(logits(loaded), expected)


def test_an_exported_model_has_what_is_stored(llama_model, model_folder, profile, tmp_path, nothing_is_made):
    expected = sparse_logits(llama_model, profile)
    exported = countdown.export(str(model_folder), profile, tmp_path / "model", include_derived=True)
    nothing_is_made()
    assert torch.equal(logits(countdown.from_pretrained(str(exported), apply_to="all")), expected)


def test_another_model_is_refused(profile):
    with pytest.raises(ProfileError, match="belongs to another model"):
        profile.with_derived(llama(intermediate_size=40))


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_where_nothing_is_derived_yet_a_model_says_how_much_memory_it_lacks(
    config, llama_model, tokenizer, text, monkeypatch
):
    profile = calibrated(llama_model, tokenizer, text, config)
    with monkeypatch.context() as patch:
        for module, name in ((symmetric, "quantise"), (svd, "truncated")):
            patch.setattr(module, name, _fail)
        for derive in (countdown.sparsify_, lambda model, of: of.with_derived(model)):
            with pytest.raises(countdown.AccidentError, match="memory ran out while deriving weights, which take"):
                derive(llama_model, profile)
    assert not sparse_modules(llama_model)


def _fail(*_):
    raise MemoryError
