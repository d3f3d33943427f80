"""Telling model sources apart, and what users see when nothing can be loaded."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as bars

from countdown import loading
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import Source, load_model, load_skeleton, load_tokenizer


def test_folder(model_folder):
    source = Source.parse(str(model_folder))
    assert (source.name, source.gguf_file, source.label) == (str(model_folder), None, "tiny-llama")


def test_hub_id():
    source = Source.parse("org/name", revision="main")
    assert source.arguments() == {"revision": "main", "trust_remote_code": False}
    assert source.label == "org/name"


def test_gguf_file(tmp_path):
    (tmp_path / "tiny.Q4.gguf").touch()
    source = Source.parse(str(tmp_path / "tiny.Q4.gguf"))
    assert source.arguments() == {"gguf_file": "tiny.Q4.gguf", "trust_remote_code": False}
    assert source.label == "tiny.Q4"


def test_what_does_not_exist_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.gguf does not exist"):
        Source.parse(str(tmp_path / "missing.gguf"))
    with pytest.raises(ConfigError, match="does not exist; expected a folder"):
        Source.parse(str(tmp_path / "missing"))
    # And not looked for on the hub.
    with pytest.raises(ConfigError, match=r"^model file missing\.GGUF does not exist\.$"):
        Source.parse("missing.GGUF")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ConfigError, match=r"no config\.json.*Did you mean .*a\.gguf"):
        Source.parse(str(tmp_path))


def test_hub_id_without_network_is_one_line():
    with pytest.raises(ConfigError, match="org/name cannot be loaded") as caught:
        load_model(Source.parse("org/name"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "asked, expected", [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtype(model_folder, asked, expected):
    model = load_model(Source.parse(str(model_folder)), dtype=asked, device="cpu")
    assert model.lm_head.weight.dtype == expected
    assert not model.training


def test_bad_dtype_and_device(model_folder):
    source = Source.parse(str(model_folder))
    with pytest.raises(ConfigError, match="dtype is 'bf32'"):
        load_model(source, dtype="bf32")
    with pytest.raises(ConfigError, match="device is 'warp', expected auto, cpu"):
        load_model(source, device="warp")


def test_missing_weights_are_not_made_up(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 of the model's weights, model\.layers\.1\.mlp\.up_proj"):
        load_model(Source.parse(str(tmp_path / "m")), device="cpu")


def test_a_damaged_checkpoint_is_one_line(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UnsupportedModelError, match="cannot be loaded"):
        load_model(Source.parse(str(tmp_path / "m")), device="cpu")


def test_revision_belongs_to_the_hub(model_folder):
    with pytest.raises(ConfigError, match="--revision belongs to models on the hub"):
        Source.parse(str(model_folder), revision="main")


def test_the_folder_one_stands_in_has_a_name(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder)
    assert Source.parse(".").label == "tiny-llama"


def test_skeleton_has_no_weights(model_folder):
    assert all(parameter.is_meta for parameter in load_skeleton(Source.parse(str(model_folder))).parameters())


def test_tokenizer(model_folder):
    assert load_tokenizer(str(model_folder)).decode(load_tokenizer(str(model_folder))("abc")["input_ids"]) == "abc"


def test_what_is_no_gguf_file_is_refused_by_its_own_name(tmp_path):
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"no weights are here" * 9)
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"^bad\.gguf cannot be loaded: "):
        load_model(Source.parse(str(file)), device="cpu")


def test_a_gguf_file_cut_short_says_so(tmp_path):
    file = tmp_path / "half.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 9)
    told = r"^half\.gguf cannot be loaded: it is cut short or damaged; get it again"
    for load in (load_model, load_skeleton, load_tokenizer):
        with pytest.raises(ConfigError, match=told):
            load(Source.parse(str(file)))


def test_a_folder_without_a_tokenizer_says_so(model_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    with pytest.raises(ConfigError, match=r"has no tokenizer; write it there with tokenizer\.save_pretrained"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_transformers_are_for_terminals(terminal, model_folder, monkeypatch):
    seen = []

    def auto_class(source):
        seen.append((bars.is_progress_bar_enabled(), logging.getLogger("torchao").isEnabledFor(logging.WARNING)))
        return real(source)

    real, level = loading._auto_class, logging.getLogger("torchao").level
    monkeypatch.setattr(loading, "_auto_class", auto_class)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    load_model(Source.parse(str(model_folder)), device="cpu")
    assert seen == [(terminal, False)]
    assert bars.is_progress_bar_enabled()
    assert logging.getLogger("torchao").level == level
