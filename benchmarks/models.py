"""The model that a script measures: one that is loaded, or random weights in a published shape."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from countdown.benchmark.decode import SHAPES, calibrated, random_model
from countdown.loading import Source, load_model, load_tokenizer, resolve_device
from countdown.methods import method
from countdown.sparsify import sparse_twin

# Random tokens, for thresholds of random weights.
CALIBRATION = (4, 512)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add what names a model and a device."""
    parser.add_argument("model", nargs="?", help="a folder, a GGUF file or a hub id")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit")


def loaded(arguments: argparse.Namespace) -> tuple[str, Any, Any]:
    """Return the label of what the arguments name, its tokenizer, and the model on its device."""
    if (arguments.model is None) == (arguments.shape is None):
        raise SystemExit("name a model or a --shape")
    device = resolve_device(arguments.device)
    if arguments.shape:
        return arguments.shape, numbered(SHAPES[arguments.shape]["vocab_size"]), random_model(arguments.shape, device)
    source = Source.parse(arguments.model)
    return source.label, load_tokenizer(source), load_model(source, device=str(device))


def sparse(model: Any, name: str, sparsity: float, tokens: list[int] | None = None) -> Any:
    """Return a sparse twin of a model, its thresholds made of these tokens, else of random ones."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, model.config.vocab_size, CALIBRATION, generator=generator)
    windows = windows if tokens is None else torch.tensor(tokens).view(-1, CALIBRATION[1])
    return sparse_twin(model, calibrated(model, method(name, sparsity=sparsity), windows))


def numbered(vocabulary: int) -> Any:
    """Return a tokenizer of so many tokens that are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(token): token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
