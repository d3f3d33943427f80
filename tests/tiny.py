"""Small random models and a tokenizer, made on the spot: no hub, no files."""

from __future__ import annotations

from typing import Any

import torch
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; does not add BOS."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<bos>"] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>")
