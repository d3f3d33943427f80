"""Small random models and a tokenizer, made on the spot: no hub, no files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Read when transformers is imported: no test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when tqdm is imported: bars of transformers would mix with what a test captures.
os.environ["TQDM_DISABLE"] = "1"
# Read when OpenMP is loaded: threads that wait for others which do not run, on a busy machine, leave them the core.
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
import torch

# Read when kernels are defined: without a device, Triton's interpreter runs them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 257  # every byte, and BOS

# Prime sizes, so that nothing fits a block by luck.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "bos_token_id": 256,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama(dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **more})).to(dtype).eval()
    return spread(model)


def gemma3(dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**SMALL, **more})).to(dtype).eval()
    return spread(model)


def spread(model: nn.Module) -> nn.Module:
    """Scale the weights up: at the initial 0.02 an FFN adds next to nothing and mistakes would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(8)
    return model


FAMILIES = {"llama": llama, "gemma3": gemma3}


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return FAMILIES[request.param]()


@pytest.fixture
def llama_model() -> nn.Module:
    return llama()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; does not add BOS."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<bos>"] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def text() -> str:
    """About 30,000 bytes of letters and spaces, with some words more common than others."""
    generator = torch.Generator().manual_seed(1)
    words = ["".join(chr(97 + (7 * i + 3 * j) % 26) for j in range(2 + i % 6)) for i in range(200)]
    picks = torch.multinomial(1 / torch.arange(1, 201).float(), 7000, replacement=True, generator=generator)
    return " ".join(words[i] for i in picks)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and its tokenizer, saved as transformers saves them."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels, so that bits are those of the dense model where nothing is dropped."""
    monkeypatch.setenv("COUNTDOWN_BACKEND", "reference")
