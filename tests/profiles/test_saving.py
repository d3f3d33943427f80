"""Saving and loading a sparsified model: dense weights, the profile beside them, both ways of loading."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

import countdown
from countdown.errors import ConfigError, ProfileError
from countdown.methods import method
from countdown.modules import sparse_modules
from tiny import SMALL, spread

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])


@pytest.fixture(params=["m-countdown", "teal"])
def profile(request, llama_model, tokenizer, text):
    config = method(request.param, sparsity=0.5)
    return countdown.calibrate(llama_model, tokenizer, text, config, tokens=1024, progress=False)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_saved_model_loads_dense_by_transformers_and_sparse_by_countdown(llama_model, profile, tmp_path):
    dense = logits(llama_model)
    countdown.sparsify_(llama_model, profile, apply_to="all")
    sparse = logits(llama_model)
    llama_model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), dense)
    again = countdown.from_pretrained(str(tmp_path), apply_to="all", device="cpu")
    assert torch.equal(logits(again), sparse)
    assert not torch.equal(sparse, dense)
    other = countdown.from_pretrained(str(tmp_path), apply_to="all", sparsity=0.1, device="cpu")
    assert countdown.status(other)[0].target_sparsity == 0.1


def test_the_weights_are_written_under_their_ordinary_names(llama_model, profile, tmp_path):
    llama_model.save_pretrained(tmp_path / "dense")
    countdown.sparsify_(llama_model, profile).save_pretrained(tmp_path / "sparse")
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("dense", "sparse")]
    assert names[1] - names[0] == {"countdown"}
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("dense", "sparse"))
    assert one == other
    assert "countdown" not in (tmp_path / "sparse" / "config.json").read_text()


def test_a_restored_model_saves_no_profile(llama_model, profile, tmp_path):
    countdown.sparsify_(llama_model, profile)
    countdown.restore_(llama_model).save_pretrained(tmp_path)
    assert not (tmp_path / "countdown").exists()


def test_saving_again_replaces_the_profile_and_nothing_else(llama_model, profile, tmp_path):
    countdown.sparsify_(llama_model, profile, sparsity=0.3).save_pretrained(tmp_path)
    countdown.sparsify_(countdown.restore_(llama_model), profile).save_pretrained(tmp_path)
    assert countdown.Profile.load(tmp_path / "countdown").entries[0].method.sparsity == 0.5
    (tmp_path / "countdown" / "mine.txt").write_text("mine")
    before = (tmp_path / "config.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"cannot be saved beside the model: .*not overwritten"):
        llama_model.save_pretrained(tmp_path)
    assert (tmp_path / "countdown" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "config.json").stat().st_mtime_ns == before


def test_a_copy_saves_itself(llama_model, profile, tmp_path):
    countdown.sparsify_(llama_model, profile)
    other = copy.deepcopy(llama_model)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    other.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert not torch.equal(saved.model.embed_tokens.weight, llama_model.model.embed_tokens.weight)


def test_pushing_would_lose_the_profile_and_is_refused(llama_model, profile, tmp_path):
    countdown.sparsify_(llama_model, profile)
    with pytest.raises(ConfigError, match="hf upload"):
        llama_model.save_pretrained(tmp_path / "m", push_to_hub=True)
    with pytest.raises(ConfigError, match="hf upload"):
        llama_model.save_pretrained(tmp_path / "m", True, torch.save, True)
    assert not (tmp_path / "m").exists()
    for model in (llama_model, copy.deepcopy(llama_model)):
        with pytest.raises(ConfigError, match="hf upload") as caught:
            model.push_to_hub("me/mine", private=True)
        assert "\n" not in str(caught.value)


def test_a_restored_model_can_be_pushed(llama_model, profile, monkeypatch):
    pushed = []
    monkeypatch.setattr(type(llama_model), "push_to_hub", lambda model, name: pushed.append((model, name)))
    countdown.restore_(countdown.sparsify_(llama_model, profile)).push_to_hub("me/mine")
    assert pushed == [(llama_model, "me/mine")]


def test_only_the_main_process_writes_the_profile(llama_model, profile, tmp_path):
    countdown.sparsify_(llama_model, profile)
    llama_model.save_pretrained(tmp_path, False)
    assert not (tmp_path / "countdown").exists()


def test_half_a_profile_on_the_hub_is_said(monkeypatch, profile, tmp_path):
    profile.save(tmp_path / "p")
    monkeypatch.setattr(
        "countdown.profiles.saving._from_hub", lambda _, name: str(tmp_path / name) if "json" in name else None
    )
    with pytest.raises(ProfileError, match=r"org/model is not whole: it has only profile\.json"):
        countdown.from_pretrained("org/model")


def test_a_name_that_the_hub_refuses_is_one_line():
    with pytest.raises(ConfigError, match="bad name!! cannot be loaded") as error:
        countdown.from_pretrained("bad name!!")
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_profile_is_none(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "countdown").mkdir()
    assert not sparse_modules(countdown.from_pretrained(str(tmp_path / "m"), device="cpu"))


def test_a_damaged_own_profile_is_said(llama_model, profile, tmp_path):
    countdown.sparsify_(llama_model, profile).save_pretrained(tmp_path)
    (tmp_path / "countdown" / "profile.json").write_text("{")
    with pytest.raises(ProfileError, match="damaged"):
        countdown.from_pretrained(str(tmp_path), device="cpu")


def test_export(model_folder, llama_model, profile, tmp_path):
    profile.save(tmp_path / "p")
    path = countdown.export(str(model_folder), tmp_path / "p", tmp_path / "deep" / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path).eval()), logits(llama_model))
    assert countdown.load_tokenizer(str(path))("abc")["input_ids"]
    loaded = countdown.from_pretrained(str(path), apply_to="all", device="cpu")
    countdown.sparsify_(llama_model, profile, apply_to="all")
    assert torch.equal(logits(loaded), logits(llama_model))
    with pytest.raises(ConfigError, match="exists already"):
        countdown.export(str(model_folder), profile, path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["m"]


def test_an_export_that_fails_leaves_nothing(model_folder, profile, tmp_path):
    short = copy.deepcopy(profile)
    del short.structure["sites"][next(iter(short.structure["sites"]))]
    with pytest.raises(ProfileError, match="another model"):
        countdown.export(str(model_folder), short, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


_RELOAD = """
import json, sys, torch, countdown
model = countdown.from_pretrained(sys.argv[1], device="cpu")
ids = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])
out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
print(json.dumps([str(model.dtype), out[0].tolist(), countdown.status(model)[0].tokens]))
"""


def test_a_sharded_bfloat16_phi3_writes_the_same_tokens_in_another_process(tokenizer, text, tmp_path):
    torch.manual_seed(0)
    config = Phi3Config(**{**SMALL, "pad_token_id": 0})
    base = spread(Phi3ForCausalLM(config)).to(torch.bfloat16).eval()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    model = countdown.from_pretrained(str(tmp_path / "base"), device="cpu")
    profile = countdown.calibrate(
        model, tokenizer, text, method("m-countdown", sparsity=0.6, weighting="rms"), tokens=1024, progress=False
    )
    countdown.sparsify_(model, profile).save_pretrained(tmp_path / "sparse", max_shard_size="20KB")
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
    run = subprocess.run(
        [sys.executable, "-c", _RELOAD, str(tmp_path / "sparse")], capture_output=True, text=True, check=True
    )
    dtype, tokens, counted = json.loads(run.stdout.splitlines()[-1])
    assert (dtype, tokens, counted) == ("torch.bfloat16", expected, 11)
    assert len(sparse_modules(model)) == 3
