"""What the environment must say before transformers is imported, and fixtures; helpers to import are in tiny.py."""

from __future__ import annotations

import os
from pathlib import Path

# Read when transformers is imported: no test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when tqdm is imported: bars of transformers would mix with what a test captures.
os.environ["TQDM_DISABLE"] = "1"
# Read when OpenMP is loaded: threads that wait for others which do not run, on a busy machine, leave them the core.
os.environ["OMP_WAIT_POLICY"] = "passive"
# Likewise. Where tests run in several processes, the threads of each would fight for the cores of the others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Read when kernels are defined: without a device, Triton's interpreter runs them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from countdown.noise import quiet_imports

# tiny.py imports models, outside of what pytest captures in a process of xdist.
with quiet_imports():
    import tiny  # noqa: F401

from torch import nn
from transformers import PreTrainedTokenizerFast

from tiny import FAMILIES, byte_tokenizer, llama


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return FAMILIES[request.param]()


@pytest.fixture
def llama_model() -> nn.Module:
    return llama()


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
