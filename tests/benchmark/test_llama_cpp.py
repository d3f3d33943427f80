"""What llama.cpp is given to read; it need not be installed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from countdown.benchmark import llama_cpp
from countdown.errors import ConfigError, UnsupportedModelError
from tiny import gemma3, llama

IDS = torch.tensor([[5, 17, 90, 3]])
# Blocks of 32, and a head per group.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind, tolerance", [("BF16", 1e-2), ("F16", 1e-3), ("Q8_0", 2e-2), ("Q4_0", 0.5)])
def test_what_is_written_is_the_model(tmp_path, kind, tolerance, tied):
    model = llama(**SIZES, tie_word_embeddings=tied, rope_theta=5000.0)
    llama_cpp.write(model, tmp_path / "model.gguf", kind)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = model(IDS).logits, other(IDS).logits
    assert torch.linalg.norm(found - expected) <= tolerance * torch.linalg.norm(expected)
    assert other.config.tie_word_embeddings == tied


def test_what_it_cannot_compare_is_refused(monkeypatch):
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install llama-cpp-python"):
        llama_cpp.check()
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: name)
    llama_cpp.check(llama())
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for other in (gemma3(), llama(mlp_bias=True), llama(rope_parameters=scaled)):
        with pytest.raises(UnsupportedModelError, match="without biases and without scaled rotations"):
            llama_cpp.check(other)
