"""llama.cpp as a yardstick from outside: the same weights, prompt and threads, through the package llama-cpp-python."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from countdown.benchmark.arm import TOKEN, Times, part_of, speeds, token_run, tokens_of
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


def arms(model: nn.Module, ids: Tensor, new_tokens: int) -> dict[str, Callable[[ExitStack], Decoding]]:
    """Return, by name, what makes llama.cpp's greedy decoding in each of `FORMATS`, until the stack is left.

    Args:
        model: Dense, on a CPU; see `check`.
        ids: The prompt `[1, n]`.
        new_tokens: How many tokens are timed, at least.
    """

    def make(kind: str, stack: ExitStack) -> Decoding:
        decoding = Decoding(model, ids[0].tolist(), new_tokens, kind)
        stack.callback(decoding.close)
        return decoding

    return {f"{NAME} {kind}": partial(make, kind) for kind in FORMATS}


class Decoding:
    """Greedy decoding in llama.cpp, on as many threads as torch has.

    Args:
        model: Dense, on a CPU; see `check`.
        prompt: Its tokens.
        new_tokens: How many tokens are timed, at least.
        kind: One of `FORMATS`.
    """

    def __init__(self, model: nn.Module, prompt: list[int], new_tokens: int, kind: str) -> None:
        import llama_cpp

        self.kind, self._part, threads = kind, part_of(new_tokens), torch.get_num_threads()
        self._room = tokens_of(new_tokens)
        length = len(prompt) + self._room
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{kind}.gguf")
            write(model, path, kind)
            # It maps the file into memory, which stays when its name is gone.
            self._llama: Any = llama_cpp.Llama(
                str(path), n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False
            )
        self._start, self._left = len(prompt), 0
        self._token = self._first = self._after(prompt)

    def run(self, tokens: int) -> None:
        """Make so many tokens, those after the prompt again where there is no room for more."""
        if tokens > self._left:
            # What comes after is forgotten when the next token is computed.
            self._llama.n_tokens, self._token, self._left = self._start, self._first, self._room
        self._left -= tokens
        for _ in range(tokens):
            self._token = self._after([self._token])

    def runs(self) -> dict[str, Callable[[], float]]:
        return {TOKEN: token_run(self.run, self._part, torch.device("cpu"))}

    def record(self, times: Times, dense: Times) -> dict[str, Any]:
        return {
            "format": self.kind,
            **speeds(times[TOKEN], dense[TOKEN]),
            "llama_cpp_python": version("llama-cpp-python"),
        }

    def close(self) -> None:
        """Free its memory."""
        self._llama.close()

    def _after(self, tokens: list[int]) -> int:
        import llama_cpp
        import numpy

        self._llama.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, (self._llama.n_vocab(),)).argmax())


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
