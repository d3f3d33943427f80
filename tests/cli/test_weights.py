"""Models whose weights are not plain finite numbers: what the commands say of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.test_cli import run
from countdown.loading import Source, load_model, load_skeleton
from tiny import byte_tokenizer, llama

QUANTISED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq, 4 bits"),
    "bitsandbytes in 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    "bitsandbytes in 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    "compressed tensors": ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    "unknown": ({"quant_method": "pebbles"}, "pebbles"),
}


def changed(folder: Path, target: Path, **config: Any) -> Path:
    """A copy of a model folder with these entries in its config.json."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


@pytest.mark.parametrize("given, said", QUANTISED.values(), ids=QUANTISED)
def test_inspect_says_that_a_checkpoint_is_quantised(given, said, model_folder, tmp_path):
    model = changed(model_folder, tmp_path / "model", quantization_config=given)
    result = run("inspect", model, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: model is quantised ({said}), and countdown computes with plain weights")
    assert len(result.stderr.splitlines()) == 1


def packed(folder: Path) -> Path:
    """Rename a weight, as quantisers that pack weights do."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qweight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_quantised_checkpoint_that_does_not_load_says_what_to_take(model_folder, tmp_path):
    # One that transformers refuses, and one of a method that it does not know and passes over.
    changed(model_folder, tmp_path / "nameless", quantization_config={"bits": 3})
    packed(changed(model_folder, tmp_path / "pebbles", quantization_config={"quant_method": "pebbles"}))
    for name, how in (("nameless", "a method it does not name, 3 bits"), ("pebbles", "pebbles")):
        result = run("generate", name, "hi", cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        said = result.stderr.splitlines()[-1]
        assert said.startswith(f"error: {name} is quantised ({how}), and countdown computes with plain weights: take")


def test_a_checkpoint_that_transformers_dequantises_loads(model_folder, tmp_path, monkeypatch):
    """Without a GPU it does so with fp8; here the weights are plain already."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"quant_method": "fp8", "weight_block_size": [128, 128], "dequantize": True}
    model = changed(model_folder, tmp_path / "model", quantization_config=given)
    loaded = load_model(Source.parse(str(model)), device="cpu")
    assert {type(module) for name, module in loaded.named_modules() if name.endswith("up_proj")} == {torch.nn.Linear}


def test_another_failure_of_a_plain_checkpoint_keeps_its_reason(model_folder, tmp_path):
    model = changed(model_folder, tmp_path / "model", model_type="nonesuch")
    for load in (load_model, load_skeleton):
        with pytest.raises(Exception, match="nonesuch"):
            load(Source.parse(str(model)))


@pytest.fixture(scope="module")
def damaged(model_folder, tmp_path_factory) -> Path:
    """A folder with a profile `p`, and `model`: that model with a NaN among its weights."""
    folder = tmp_path_factory.mktemp("damaged")
    made = ("--method", "cats", "--tokens", "512", "-q")
    assert run("calibrate", model_folder, "-o", "p", *made, cwd=folder).returncode == 0
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[2, 3] = torch.nan
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("one\ntwo\n")
    return folder


NAMED = "model.layers.1.mlp.down_proj.weight holds NaN or infinity"
ON_DAMAGED = {
    "a text": ["evaluate", "model", "--profile", "p", "--windows", "1"],
    "prompts": ["evaluate", "model", "--profile", "p", "--prompts", "prompts.txt", "--max-new-tokens", "2"],
    "calibration": ["calibrate", "model", "-o", "new", "--method", "cats", "--tokens", "512"],
    "a choice": ["calibrate", "model", "-o", "new", "--tokens", "2048"],
}


@pytest.mark.filterwarnings("ignore::countdown.errors.ProfileWarning")
@pytest.mark.parametrize("arguments", ON_DAMAGED.values(), ids=ON_DAMAGED)
def test_weights_that_are_not_finite_end_a_command_and_are_named(arguments, damaged):
    wants_json = arguments[0] == "evaluate"
    before = sorted(damaged.rglob("*"))
    result = run(*arguments, "-q", *(["--json", "found.json"] if wants_json else []), cwd=damaged)
    assert (result.returncode, result.stdout) == (2, "")
    assert NAMED in result.stderr.splitlines()[-1]
    assert sorted(damaged.rglob("*")) == before
