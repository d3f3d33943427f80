"""Proxies that are stored with a profile: they are used where they fit, and made anew where they do not."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import countdown
from countdown.errors import ConfigError, ProfileError
from countdown.methods import method
from countdown.modules import sparse_modules
from countdown.profiles.profile import Profile
from countdown.profiles.stored import FILE
from countdown.weights import symmetric
from tiny import llama

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])


@pytest.fixture
def profile(llama_model, tokenizer, text):
    config = method("d-proxy", sparsity=0.6)
    return countdown.calibrate(llama_model, tokenizer, text, config, tokens=512, progress=False)


@pytest.fixture
def stored(llama_model, profile, tmp_path):
    return profile.with_proxies(llama_model).save(tmp_path / "p")


def tensors(module):
    return [tensor for part in module.parts for tensor in part.parts]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_stored_proxies_are_used_and_give_the_same(llama_model, profile, stored, monkeypatch):
    countdown.sparsify_(llama_model, profile, apply_to="all")
    expected = logits(llama_model)
    made = {name: tensors(module) for name, module in sparse_modules(llama_model).items()}
    countdown.restore_(llama_model)
    monkeypatch.setattr(symmetric, "quantise", None)  # nothing is made
    countdown.sparsify_(llama_model, Profile.load(stored).with_settings(sparsity=0.6), apply_to="all")
    for name, module in sparse_modules(llama_model).items():
        assert all(torch.equal(one, other) for one, other in zip(made[name], tensors(module), strict=True))
    assert torch.equal(logits(llama_model), expected)


def test_other_weights_make_other_proxies(llama_model, stored):
    countdown.sparsify_(llama_model, Profile.load(stored))
    module, *_ = sparse_modules(llama_model).values()
    before = [part.clone() for part in tensors(module)]
    other = {key: -2 * value for key, value in llama_model.state_dict().items()}
    llama_model.load_state_dict(other)
    assert not torch.equal(before[0], tensors(module)[0])


def test_proxies_of_other_weights_are_made_anew(llama_model, profile, stored):
    with torch.no_grad():
        llama_model.model.layers[1].mlp.up_proj.weight[5] += 1e-3
    with pytest.warns(countdown.ProfileWarning, match="stored proxies do not fit these weights") as caught:
        countdown.sparsify_(llama_model, Profile.load(stored), apply_to="all")
    assert len(caught) == 1
    found = logits(llama_model)
    countdown.restore_(llama_model)
    countdown.sparsify_(llama_model, profile, apply_to="all")
    assert torch.equal(logits(llama_model), found)


def test_proxies_of_another_shape_are_made_anew(llama_model, profile, stored):
    loaded = Profile.load(stored)
    key = "model.layers.0.mlp/gate_levels"
    loaded.proxies.tensors[key] = loaded.proxies.tensors[key][:, :-1]
    with pytest.warns(countdown.ProfileWarning, match="stored proxies do not fit"):
        countdown.sparsify_(llama_model, loaded, apply_to="all")
    assert logits(llama_model).isfinite().all()


def test_a_saved_model_of_another_dtype_loads(llama_model, stored, tmp_path):
    countdown.sparsify_(llama_model, Profile.load(stored))
    llama_model.bfloat16().save_pretrained(tmp_path / "model")
    with pytest.warns(countdown.ProfileWarning, match="stored proxies do not fit"):
        assert sparse_modules(countdown.from_pretrained(str(tmp_path / "model")))


def test_proxies_of_another_calibration_are_made_anew(llama_model, tokenizer, stored, tmp_path):
    other = countdown.calibrate(
        llama_model, tokenizer, "another text. " * 500, method("d-proxy"), tokens=512, progress=False
    ).save(tmp_path / "other")
    (stored / FILE).rename(other / FILE)
    with pytest.warns(countdown.ProfileWarning, match="stored proxies do not fit"):
        countdown.sparsify_(llama_model, Profile.load(other))


def test_a_damaged_file_is_refused(stored):
    (stored / FILE).write_bytes((stored / FILE).read_bytes()[:100])
    again = re.escape(f"Make it again: countdown calibrate MODEL -o {stored} --overwrite")
    with pytest.raises(ProfileError, match=rf"is damaged: .*\. {again}$"):
        Profile.load(stored)


@pytest.mark.parametrize("hashes", ["[]", '"text"', '{"model.layers.1.mlp": 3}'])
def test_hashes_of_another_type_are_refused(hashes, stored):
    save_file(load_file(stored / FILE), stored / FILE, {"hashes": hashes})
    with pytest.raises(ProfileError, match=r"is damaged: .*hashes in .* are not text by site"):
        Profile.load(stored)


def test_a_profile_with_proxies_may_be_overwritten(profile, stored):
    profile.save(stored, overwrite=True)
    assert not (stored / FILE).exists()


def test_without_a_proxy_there_is_none_to_store(llama_model, tokenizer, text):
    dense = countdown.calibrate(llama_model, tokenizer, text, method("cats"), tokens=512, progress=False)
    with pytest.raises(ConfigError, match="no method of this profile has a proxy"):
        dense.with_proxies(llama_model)


def test_saving_a_sparsified_model_keeps_its_proxies(llama_model, stored, tmp_path, monkeypatch):
    countdown.sparsify_(llama_model, Profile.load(stored), apply_to="all")
    expected = logits(llama_model)
    llama_model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "countdown" / FILE).is_file()
    monkeypatch.setattr(symmetric, "quantise", None)
    loaded = countdown.from_pretrained(str(tmp_path / "model"), apply_to="all")
    assert torch.equal(logits(loaded), expected)


def test_another_model_is_refused(profile):
    with pytest.raises(ProfileError, match="belongs to another model"):
        profile.with_proxies(llama(intermediate_size=40))
