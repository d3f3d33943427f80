"""Whole decoding, dense and sparse in the same loop, and where a token's time goes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from countdown.benchmark.timing import bandwidth, graph_time, require_cuda
from countdown.calibration.calibrate import calibrate
from countdown.config import check_choice
from countdown.cost import token_bytes
from countdown.decoding import DecodeLoop
from countdown.methods import Method
from countdown.models.find import find_ffns
from countdown.models.loading import DTYPES
from countdown.profile import Profile
from countdown.sparsify import reset_counters, restore_, sparsify_, status

PREFILL_TOKENS = 2048
# Random tokens, for thresholds of random weights.
CALIBRATION = (4, 256)

# Shapes of published models, for random weights made on the device.
SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}


def random_model(shape: str, *, dtype: str = "bfloat16", layers: int | None = None) -> nn.Module:
    """Return a Llama of this shape with random weights, made on the CUDA device.

    Args:
        shape: A key of `SHAPES`.
        dtype: `bfloat16`, `float16` or `float32`.
        layers: Another number of layers.

    Raises:
        ConfigError: Unknown shape or dtype, or no CUDA device.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    check_choice("--shape", shape, SHAPES)
    check_choice("dtype", dtype, DTYPES)
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False, dtype=DTYPES[dtype])
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device(require_cuda()):
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


@dataclass(frozen=True)
class DecodeBenchmark:
    """What to measure.

    Args:
        context: Tokens of the prompt.
        new_tokens: Tokens that are timed.
        generate: Measure Hugging Face's generate, static cache and compiled, as well.
        prefill: Measure a prompt of `PREFILL_TOKENS` tokens as well.
    """

    context: int = 512
    new_tokens: int = 128
    generate: bool = False
    prefill: bool = True


def run(
    model: nn.Module, what: Method | Profile, benchmark: DecodeBenchmark, *, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Return a record of the dense model and one of the sparse one, measured in the same loop.

    Args:
        model: A dense model on a CUDA device; left dense.
        what: A profile of it, or a method that is calibrated on random tokens, for random weights.
        benchmark: What to measure.
        say: Called with a line at the start of each step.

    Raises:
        ConfigError, UnsupportedModelError, ProfileError: See `DecodeLoop` and `sparsify_`.
    """
    device = require_cuda()
    copy = bandwidth().copy
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, benchmark.context), generator=generator).to(device)
    say("measuring dense")
    dense = _arm(model, ids, benchmark)
    if isinstance(what, Method):
        say(f"calibrating {what} on random tokens")
        some = torch.randint(0, vocabulary, CALIBRATION, generator=generator)
        batch = {"input_ids": some, "attention_mask": torch.ones_like(some)}
        what = calibrate(model, None, batch, what, progress=False)
    sparsify_(model, what)
    try:
        say("measuring sparse")
        reset_counters(model)
        sparse = _arm(model, ids, benchmark)
        sites = status(model)
    finally:
        restore_(model)
    size = sum(site.size for site in sites)
    read = sum((site.weights_read or 0.0) * site.size for site in sites) / size
    realised = sum((site.realised_sparsity or 0.0) * site.size for site in sites) / size
    bytes_ = token_bytes(model, find_ffns(model))
    common = {
        "vocab": vocabulary,
        "layers": len(sites),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokens": 1,
        "context": benchmark.context,
        "new_tokens": benchmark.new_tokens,
        "bandwidth": copy,
    }
    floors = (bytes_.total / copy, (bytes_.other + read * bytes_.own) / copy)
    records = [common | {"run": "dense"} | dense, common | {"run": "sparse", **what.recipe.record()} | sparse]
    records[1] |= {"realised_sparsity": realised, "weights_read": read, "backend": sites[0].backend}
    for record, floor in zip(records, floors, strict=True):
        record["floor_us"] = floor * 1e6
        record["floor_share"] = floor * record["tokens_per_s"]
        record["dense_tokens_per_s"] = dense["tokens_per_s"]
        record["speedup"] = record["tokens_per_s"] / dense["tokens_per_s"]
        if benchmark.prefill:
            record["prefill_ratio"] = record["prefill_ms"] / dense["prefill_ms"]
    return records


@torch.no_grad()
def _arm(model: nn.Module, ids: Tensor, benchmark: DecodeBenchmark) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if benchmark.prefill:
        found["prefill_ms"] = _prefill(model, ids)
    started = time.perf_counter()
    loop = DecodeLoop(model, ids, new_tokens=2 * benchmark.new_tokens)
    found["compile_s"] = time.perf_counter() - started
    loop.run(benchmark.new_tokens)
    torch.cuda.synchronize()
    started = time.perf_counter()
    loop.run(benchmark.new_tokens)
    torch.cuda.synchronize()
    per_token = (time.perf_counter() - started) / benchmark.new_tokens
    found |= {"tokens_per_s": 1 / per_token, "time_us": per_token * 1e6}
    found["split_us"] = _split(model, per_token * 1e6)
    del loop
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    if benchmark.generate:
        found["generate_tokens_per_s"] = _generate(model, ids, benchmark.new_tokens)
    return found


def _prefill(model: nn.Module, ids: Tensor) -> float:
    """Return the median ms of a prompt of `PREFILL_TOKENS` tokens, eager."""
    prompt = ids.repeat(1, -(-PREFILL_TOKENS // ids.shape[1]))[:, :PREFILL_TOKENS]
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model(prompt, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return sorted(times[2:])[2]


def _split(model: nn.Module, total: float) -> dict[str, float]:
    """Return µs of a token in FFNs, the linears of attention, the head, and all the rest.

    Each part is captured by itself, its kernels those of the step; the rest is what remains of the total: scores,
    cache, norms, and the gaps between kernels.
    """
    modules = dict(model.named_modules())
    ffns = [module for name, module in modules.items() if name.endswith(_ffn_names(model))]
    inside = {id(part) for ffn in ffns for part in ffn.modules()}
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    layers = model.get_decoder()  # type: ignore[operator]
    linears = [m for m in layers.modules() if type(m) is nn.Linear and id(m) not in inside]
    x = torch.randn(1, head.in_features, dtype=head.weight.dtype, device=head.weight.device)
    inputs = {m.in_features: torch.randn(1, m.in_features, dtype=x.dtype, device=x.device) for m in linears}
    parts = {
        "ffn": graph_time(lambda: [_ffn(ffn, x) for ffn in ffns]),
        "attention_linears": graph_time(lambda: [_project(inputs[m.in_features], m) for m in linears]),
        "head": graph_time(lambda: _project(x, head).argmax(dim=-1)),
    }
    return parts | {"rest": total - sum(parts.values())}


def _ffn_names(model: nn.Module) -> tuple[str, ...]:
    from countdown.modules import sparse_sites

    return tuple(sparse_sites(model)) or tuple(ffn.name for ffn in find_ffns(model))


@torch.compile(dynamic=False)
def _gated(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


def _ffn(module: nn.Module, x: Tensor) -> Tensor:
    from countdown.modules import SparseFFN

    if isinstance(module, SparseFFN):
        y: Tensor = module(x[None])
        return y
    linears = [child for child in module.children() if type(child) is nn.Linear]
    wide, down = linears[:-1], linears[-1]
    g, u = [part for linear in wide for part in _project(x, linear).split(down.in_features, dim=1)]
    return _project(_gated(g, u), down)


def _project(x: Tensor, linear: nn.Linear) -> Tensor:
    return torch.ops.countdown.project_one(x, linear.weight, linear.bias)  # type: ignore[no-any-return]


def _generate(model: nn.Module, ids: Tensor, new_tokens: int) -> float:
    """Return tokens/s of Hugging Face's generate with a static cache, compiled as it compiles by itself."""
    speeds = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        speeds.append(new_tokens / (time.perf_counter() - started))
    return speeds[-1]
