"""llama.cpp as a yardstick from outside: the same weights, prompt and threads, through the package llama-cpp-python."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from countdown.errors import ConfigError, UnsupportedModelError

NAME = "llama.cpp"
# By the names of GGUF. Norms stay in float32.
FORMATS = ("BF16", "F16", "Q8_0", "Q4_0")


def check(model: nn.Module | None = None) -> None:
    """Raise unless llama.cpp can be measured, on this model if there is one already.

    Raises:
        ConfigError: llama.cpp or the writer of its files is not installed, or the model is on another device.
        UnsupportedModelError: llama.cpp would compute something else: no Llama, or one with biases or scaled rotations.
    """
    packages = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"--versus {NAME} needs {' and '.join(missing)}: pip install {' '.join(missing)}. Where a CPU has AMX and "
            "its tiles are not enabled, set CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AMX_TILE=OFF' before."
        )
    if model is None:
        return
    config: Any = model.config
    if next(model.parameters()).device.type != "cpu":
        raise ConfigError(f"--versus {NAME} compares on a CPU: add --device cpu.")
    plain = type(model).__name__ == "LlamaForCausalLM" and not (config.attention_bias or config.mlp_bias)
    if not plain or config.rope_parameters.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"--versus {NAME} writes Llamas without biases and without scaled rotations; this {type(model).__name__} "
            "is another model."
        )


def measure(model: nn.Module, ids: Tensor, new_tokens: int) -> Iterator[dict[str, Any]]:
    """Yield a record of llama.cpp's greedy decoding for each of `FORMATS`, on as many threads as torch has.

    Args:
        model: Dense, on a CPU; see `check`.
        ids: The prompt `[1, n]`.
        new_tokens: How many tokens are timed, after as many that are not.
    """
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            path = Path(folder, f"{kind}.gguf")
            write(model, path, kind)
            speed = _tokens_per_s(path, ids[0].tolist(), new_tokens, torch.get_num_threads())
            path.unlink()
            yield {"format": kind, "tokens_per_s": speed, "llama_cpp_python": version("llama-cpp-python")}


def write(model: nn.Module, path: Path, kind: str) -> None:
    """Write a Llama's weights as a GGUF file without vocabulary.

    Args:
        model: See `check`.
        path: File to write.
        kind: One of `FORMATS`.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
    from gguf.quants import quantize

    config: Any = model.config
    writer = GGUFWriter(path, "llama")
    _add_settings(writer, config)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = _rotated(name, weight, config).float().numpy()
        stored = GGMLQuantizationType[kind if weight.dim() == 2 else "F32"]
        writer.add_tensor(names.get_name(name, (".weight",)), quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _rotated(name: str, weight: Tensor, config: Any) -> Tensor:
    """Return the rows of queries and keys in llama.cpp's order: it rotates neighbours, transformers rotates halves."""
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    ending = ".".join(name.split(".")[-2:])
    if ending not in heads:
        return weight
    return weight.view(heads[ending], 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tokens_per_s(path: Path, prompt: list[int], new_tokens: int, threads: int) -> float:
    import llama_cpp
    import numpy

    llama = llama_cpp.Llama(
        str(path), n_ctx=len(prompt) + 2 * new_tokens + 1, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def step(tokens: list[int]) -> list[int]:
        llama.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return [int(numpy.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax())]

    token = step(prompt)
    for _ in range(new_tokens):
        token = step(token)
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = step(token)
    elapsed = time.perf_counter() - started
    llama.close()
    return new_tokens / elapsed
