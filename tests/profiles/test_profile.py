"""Saving, loading and checking profiles."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import countdown
from countdown.calibration.calibrate import calibrate
from countdown.errors import AccidentError, ConfigError, ProfileError, ProfileWarning
from countdown.methods import method
from countdown.profiles.profile import Profile, check_free
from countdown.sites.ffn import find_ffns
from tiny import gemma3, llama


@pytest.fixture
def profile(llama_model, tokenizer, text):
    config = method("m-countdown", sparsity=0.6, weighting="column-norm")
    return calibrate(llama_model, tokenizer, text, config, tokens=512, progress=False)


def selector(profile, ffn):
    found = profile.settings([ffn])[ffn.name]
    return found.method, found.per_term


def test_round_trip(profile, llama_model, tmp_path):
    again = Profile.load(profile.save(tmp_path / "deep" / "p"))
    assert (again.base_model, again.structure, again.calibration) == (
        profile.base_model,
        profile.structure,
        profile.calibration,
    )
    for ffn in find_ffns(llama_model):
        one, other = selector(profile, ffn), selector(again, ffn)
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_only_the_two_files_are_left(profile, tmp_path):
    profile.save(tmp_path / "p")
    profile.save(tmp_path / "p", overwrite=True)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "p",
        "p/profile.json",
        "p/profile.safetensors",
    ]


def test_nothing_is_overwritten_unasked(profile, tmp_path):
    profile.save(tmp_path / "p")
    with pytest.raises(ProfileError, match=r"exists already; give another path or overwrite=True\.$"):
        profile.save(tmp_path / "p")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    with pytest.raises(ProfileError, match="is not a profile and nothing else"):
        profile.save(precious, overwrite=True)
    assert (precious / "file").read_text() == "mine"


def test_a_failed_save_leaves_the_old_profile(profile, tmp_path, monkeypatch):
    profile.save(tmp_path / "p")
    before = (tmp_path / "p" / "profile.json").read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("countdown.profiles.profile.save_tensors", full)
    with pytest.raises(AccidentError, match="No space left"):
        profile.save(tmp_path / "p", overwrite=True)
    assert (tmp_path / "p" / "profile.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("failure", [OSError("I/O error"), KeyboardInterrupt()], ids=["fails", "interrupted"])
def test_an_overwrite_that_stops_half_way_leaves_the_old_profile(failure, profile, tmp_path, monkeypatch):
    path = profile.save(tmp_path / "p")
    before = (path / "profile.json").read_bytes()
    replace, calls = os.replace, []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise failure
        replace(*arguments)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises((AccidentError, KeyboardInterrupt)):
        profile.with_settings(sparsity=0.1).save(path, overwrite=True)
    assert (path / "profile.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_a_linked_profile_is_overwritten_where_it_is(profile, tmp_path):
    path = profile.save(tmp_path / "deep" / "p")
    (path / "profile.json").chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    profile.with_settings(sparsity=0.1).save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").readlink() == path
    assert Profile.load(path).entries[0].method.sparsity == 0.1
    assert (path / "profile.json").stat().st_mode & 0o777 == 0o640


def test_overwriting_spares_what_is_not_the_profiles(profile, tmp_path):
    path = profile.save(tmp_path / "p")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ProfileError, match="is not a profile and nothing else"):
        profile.save(path, overwrite=True)
    assert (path / "notes.txt").read_text() == "mine"


def test_a_path_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="is not a folder that you may write to"):
        check_free(tmp_path / "file" / "p", overwrite=False)


def edited(tmp_path, profile, **changes):
    path = profile.save(tmp_path / "p")
    header = json.loads((path / "profile.json").read_text())
    (path / "profile.json").write_text(json.dumps({**header, **changes}))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 3}, "upgrade it"),
        ({"format": "other"}, "not a countdown profile"),
        ({"entires": []}, "Did you mean 'entries'"),
        ({"entries": [{"pattern": "*", "method": {"name": "nope"}}]}, "method is 'nope'"),
        ({"entries": None}, "damaged"),
        ({"entries": []}, "damaged"),
        ({"structure": {}}, "damaged: .*structure"),
        ({"calibration": {}}, "damaged: .*calibrated on"),
        ({"base_model": "llama"}, "damaged: .*calibrated on"),
        ({"structure": {"class": "LlamaForCausalLM", "ffns": {}}}, "damaged: .*structure"),
    ],
)
def test_what_cannot_be_read_is_said(changes, message, profile, tmp_path):
    with pytest.raises((ProfileError, ConfigError), match=message):
        Profile.load(edited(tmp_path, profile, **changes))


W, T = "entry/0/model.layers.1.mlp/multipliers", "entry/0/model.layers.1.mlp/thresholds"
S = "sample/model.layers.1.mlp"


I = "entry/0/model.layers.1.mlp/importance"  # noqa: E741


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "importance .* are missing"),
        (lambda t: t[:-1], r"importance .* have shape \(23,\), expected \(24,\)"),
        (lambda t: -t - 1, "importance .* are negative"),
        (lambda t: t * torch.nan, "importance .* not finite"),
    ],
)
def test_an_importance_that_does_not_fit_is_said(change, message, llama_model, tokenizer, text, tmp_path):
    config = method("d-proxy", sparsity=0.5)
    made = countdown.calibrate(llama_model, tokenizer, text, config, tokens=512, progress=False)
    path = made.save(tmp_path / "p")
    assert Profile.load(path).entries[0].method == config
    tensors = load_file(path / "profile.safetensors")
    tensor = tensors.pop(I)
    if change is not None:
        tensors[I] = change(tensor).contiguous()
    save_file(tensors, path / "profile.safetensors")
    with pytest.raises(ProfileError, match=f"damaged: .*{message}"):
        Profile.load(path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (W, lambda t: t[:-1], r"multipliers of model\.layers\.1\.mlp have shape \(52,\), expected \(53,\)"),
        (W, lambda t: t * torch.nan, "multipliers .* not finite"),
        (W, lambda t: -t, "negative"),
        (W, lambda t: t.double(), "multipliers .* are not float32"),
        (W, None, "multipliers of .* are missing"),
        (I, lambda _: torch.ones(24), "importance of .* and its method disagree"),
        (T, lambda t: torch.cat([t[:1], t[1:] * torch.nan]), "thresholds .* not finite"),
        (T, lambda t: torch.cat([t[:1], t[1:].flip(0)]), "fall"),
        (T, lambda t: t + 1, "begin elsewhere"),
        (T, lambda t: t[:0], r"thresholds of .* have shape \(0,\), expected \(1000,\)"),
        (T, lambda t: t[None], r"thresholds of .* have shape \(1, 1000\)"),
        (S, lambda t: t * torch.nan, "weight sample"),
        (S, lambda t: t[:2], "weight sample"),
        (S, None, "weight samples do not match"),
    ],
)
def test_contents_that_do_not_fit_are_said(key, change, message, profile, tmp_path):
    path = profile.save(tmp_path / "p")
    tensors = load_file(path / "profile.safetensors")
    tensor = tensors.pop(key, None)
    if change is not None:
        tensors[key] = change(tensor).contiguous()
    save_file(tensors, path / "profile.safetensors")
    with pytest.raises(ProfileError, match=f"damaged: .*{message}"):
        Profile.load(path)


@pytest.mark.parametrize("key", ["sites/0/model.layers.1.mlp/thresholds", "entry/-1/model.layers.1.mlp/thresholds"])
def test_tensors_of_no_entry_are_said(key, profile, tmp_path):
    path = profile.save(tmp_path / "p")
    save_file(load_file(path / "profile.safetensors") | {key: torch.zeros(1000)}, path / "profile.safetensors")
    with pytest.raises(ProfileError, match=f"damaged: .*tensor '{key}' belongs to no entry"):
        Profile.load(path)


@pytest.mark.parametrize("version", [True, 0, -1, 1.5, "2", None])
def test_a_version_that_is_none_is_said(version, profile, tmp_path):
    path = profile.save(tmp_path / "p")
    header = json.loads((path / "profile.json").read_text())
    (path / "profile.json").write_text(json.dumps(header | {"version": version}))
    with pytest.raises(ProfileError, match=r"damaged: .*version is "):
        Profile.load(path)


@pytest.mark.parametrize(
    "header",
    [b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b""],
    ids=["huge", "longer than the file", "not an object", "empty"],
)
def test_a_hostile_header_is_refused(header, profile, tmp_path):
    path = profile.save(tmp_path / "p")
    (path / "profile.safetensors").write_bytes(header)
    with pytest.raises(ProfileError, match="damaged"):
        Profile.load(path)


@pytest.mark.parametrize("header", ["[" * 200_000, '{"version": 1' + "0" * 400 + "}"], ids=["deep", "large"])
def test_headers_meant_to_break_the_reader_are_refused(header, profile, tmp_path):
    path = profile.save(tmp_path / "p")
    (path / "profile.json").write_text(header)
    with pytest.raises(ProfileError):
        Profile.load(path)


def test_damaged_files_are_said(profile, tmp_path):
    path = profile.save(tmp_path / "p")
    tensors = (path / "profile.safetensors").read_bytes()
    (path / "profile.safetensors").write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(ProfileError, match="damaged"):
        Profile.load(path)
    (path / "profile.json").write_text("{")
    with pytest.raises(ProfileError, match="damaged"):
        Profile.load(path)
    with pytest.raises(ProfileError, match="is not a profile"):
        Profile.load(tmp_path)


def test_the_same_model_in_another_dtype_is_the_same_model(profile, recwarn):
    countdown.sparsify_(llama(torch.bfloat16), profile)
    countdown.sparsify_(llama(torch.float16), profile)
    assert not [warning for warning in recwarn if warning.category is ProfileWarning]


def test_other_weights_warn(profile):
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    with pytest.warns(ProfileWarning, match="weights differ"):
        countdown.sparsify_(other, profile)


@pytest.mark.parametrize(
    "make",
    [gemma3, lambda: llama(intermediate_size=54), lambda: llama(num_hidden_layers=2), lambda: llama(hidden_act="gelu")],
    ids=["class", "shape", "layers", "activation"],
)
def test_another_structure_is_refused(make, profile):
    model = make()
    with pytest.raises(ProfileError, match=r"belongs to another model: .*LlamaForCausalLM with 3 modules"):
        countdown.sparsify_(model, profile)
    assert not any("Sparse" in type(module).__name__ for module in model.modules())


def test_sparsity_and_decision_change_without_calibration(profile, llama_model):
    ffn = find_ffns(llama_model)[0]
    low, high = (selector(profile.with_settings(sparsity=s), ffn)[1] for s in (0.3, 0.8))
    assert (low < high).all()
    config, weights = selector(profile.with_settings(decision="topk"), ffn)
    assert config.decision == "topk"
    assert torch.equal(weights, profile.entries[0].sites[ffn.name]["multipliers"])
    with pytest.raises(ConfigError, match="0 ≤ sparsity < 1"):
        profile.with_settings(sparsity=2)
    with pytest.raises(ConfigError, match="calibrate again"):
        profile.with_settings(weighting="none")
    assert profile.with_settings(weighting="column-norm").entries[0].method == profile.entries[0].method
    with pytest.raises(ConfigError, match="no field 'name'"):
        profile.with_settings(name="cats")


def test_thresholds_divide_by_the_weights(profile, llama_model):
    ffn = find_ffns(llama_model)[0]
    site = profile.entries[0].sites[ffn.name]
    _, thresholds = selector(profile, ffn)
    torch.testing.assert_close(thresholds * site["multipliers"], torch.full((53,), site["thresholds"][600].item()))
    assert (selector(profile.with_settings(sparsity=0.0), ffn)[1] == -1).all()


def test_sparsities_between_the_points_are_interpolated(profile, llama_model):
    ffn = find_ffns(llama_model)[0]
    curve = profile.entries[0].sites[ffn.name]["thresholds"]
    weights = profile.entries[0].sites[ffn.name]["multipliers"]
    for sparsity, tau in ((0.6005, curve[600:602].mean()), (0.0005, curve[1] / 2), (0.9999, curve[999])):
        thresholds = selector(profile.with_settings(sparsity=sparsity), ffn)[1]
        torch.testing.assert_close(thresholds * weights, tau.expand(53), rtol=1e-4, atol=0)


def test_a_neuron_of_weight_zero_is_never_active(llama_model, tokenizer, text):
    with torch.no_grad():
        # act(0) = 0, so E[a²] = 0: whatever u is, the neuron adds nothing.
        llama_model.model.layers[0].mlp.gate_proj.weight[7] = 0
    config = method("m-countdown", sparsity=0.5, weighting="rms")
    profile = calibrate(llama_model, tokenizer, text, config, tokens=512, progress=False)
    _, thresholds = selector(profile, find_ffns(llama_model)[0])
    assert thresholds[7] == torch.inf
    assert thresholds.isfinite().sum() == 52


def test_a_threshold_that_was_not_calibrated_is_refused(profile, llama_model):
    for site in profile.entries[0].sites.values():
        del site["thresholds"]
    with pytest.raises(ProfileError, match="has no thresholds"):
        countdown.sparsify_(llama_model, profile)


def test_a_profile_shows_in_one_line(profile):
    named = profile.with_name("my-model")
    assert repr(named) == "<Profile of my-model: m-countdown × column-norm, threshold at 0.6; 3 modules>"
    assert len(repr(named.entries)) < 200


def test_a_profile_edited_where_files_begin_with_a_mark(profile, tmp_path):
    header = profile.save(tmp_path / "p") / "profile.json"
    header.write_bytes(b"\xef\xbb\xbf" + header.read_bytes())
    assert Profile.load(tmp_path / "p").structure == profile.structure
