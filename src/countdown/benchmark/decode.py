"""Whole decoding, dense and sparse in the same loop, and where a token's time goes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from countdown.benchmark import llama_cpp
from countdown.benchmark.timing import bandwidth, step_time, wait
from countdown.calibration.calibrate import calibrate
from countdown.config import check_choice
from countdown.cost import token_bytes
from countdown.decoding import DecodeLoop, largest
from countdown.errors import ConfigError
from countdown.methods import Method
from countdown.models.find import find_ffns
from countdown.models.loading import DTYPES, check_context
from countdown.models.sites import GatedFFN
from countdown.modules import sparse_sites
from countdown.ops.activations import ACTIVATIONS
from countdown.profile import Profile
from countdown.replay import recorded
from countdown.sparsify import reset_counters, restore_, sparsify_, status

# By type of device, the tokens of a prompt that is timed, and how often.
PREFILL = {"cuda": (2048, 7), "cpu": (512, 5)}
# The tokens that are timed come in so many parts.
PARTS = 8
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


def random_model(shape: str, device: torch.device, *, dtype: str = "bfloat16", layers: int | None = None) -> nn.Module:
    """Return a Llama of this shape with random weights, made on the device.

    Args:
        shape: A key of `SHAPES`.
        device: Where.
        dtype: `bfloat16`, `float16` or `float32`.
        layers: Another number of layers.

    Raises:
        ConfigError: Unknown shape or dtype.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    check_choice("--shape", shape, SHAPES)
    check_choice("dtype", dtype, DTYPES)
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False, dtype=DTYPES[dtype])
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with device:
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
        generate: Measure Hugging Face's generate of the dense model, static cache and compiled, as well.
        llama_cpp: Measure llama.cpp on the dense weights, as they are and quantised, as well.
        prompt: Its tokens, int64 `[1, context]`; random ones when omitted, which active sets are not calibrated for.
    """

    context: int = 512
    new_tokens: int = 128
    generate: bool = False
    llama_cpp: bool = False
    prompt: Tensor | None = None


def run(
    model: nn.Module,
    whats: Sequence[Method | Profile],
    benchmark: DecodeBenchmark,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Yield a record of the dense model, one of each sparse one in the same loop, and those of others if asked for.

    Args:
        model: A dense model on a CUDA device or a CPU; left dense.
        whats: Profiles of it, or methods that are calibrated on random tokens, for random weights.
        benchmark: What to measure.
        say: Called with a line at the start of each step.

    Raises:
        ConfigError, UnsupportedModelError, ProfileError: See `DecodeLoop` and `sparsify_`.
    """
    device = next(model.parameters()).device
    check_whats(whats)
    if benchmark.llama_cpp:
        llama_cpp.check(model)
    check_context(model, benchmark.context + 2 * benchmark.new_tokens)
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, benchmark.context), generator=generator)
    ids = (ids if benchmark.prompt is None else benchmark.prompt).to(device)
    ffns = find_ffns(model)
    size = token_bytes(model, ffns)
    common = {
        "vocab": vocabulary,
        "layers": len(ffns),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokens": 1,
        "context": benchmark.context,
        "new_tokens": benchmark.new_tokens,
        "prompt": "random tokens" if benchmark.prompt is None else "text",
        **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
        "bandwidth": bandwidth(device).floor,
    }
    say("measuring dense")
    dense = measure_arm(model, ids, benchmark)
    yield common | {"run": "dense"} | _compared(dense, dense, size.total / common["bandwidth"])
    some = torch.randint(0, vocabulary, CALIBRATION, generator=generator)
    for what in whats:
        say(f"measuring {what if isinstance(what, Method) else what.recipe}")
        profile = what if isinstance(what, Profile) else _calibrated(model, what, some)
        sparsify_(model, profile)
        try:
            sparse = measure_arm(model, ids, benchmark)
        finally:
            restore_(model)
        shares = sparse.pop("weights_read_by_ffn")
        sparse["weights_read"] = sum(shares.get(f.name, 1.0) * f.size for f in ffns) / sum(f.size for f in ffns)
        floor = (size.other + sparse["weights_read"] * size.own) / common["bandwidth"]
        yield common | {"run": "sparse"} | profile.recipe.record() | _compared(sparse, dense, floor)
    if benchmark.generate:
        say("measuring Hugging Face's generate")
        yield common | {"run": "generate", "tokens_per_s": _generate(model, ids, benchmark.new_tokens)}
    if benchmark.llama_cpp:
        say("measuring llama.cpp")
        for record in llama_cpp.measure(model, ids, benchmark.new_tokens):
            yield common | {"run": llama_cpp.NAME} | record


def check_whats(whats: Sequence[Method | Profile]) -> None:
    """Raise ConfigError unless these apply to FFNs alone."""
    for what in whats:
        kinds = [what.kind] if isinstance(what, Method) else what.kinds
        if kinds != [GatedFFN.kind]:
            raise ConfigError("the decode benchmark measures sparse FFNs; this profile or method has others as well.")


def _calibrated(model: nn.Module, method: Method, tokens: Tensor) -> Profile:
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return calibrate(model, None, batch, method, progress=False)


def _compared(arm: dict[str, Any], dense: dict[str, Any], floor: float) -> dict[str, Any]:
    """Return what was measured of an arm, and against the floor, in s, and the dense arm."""
    return arm | {
        "floor_us": floor * 1e6,
        "floor_share": floor * arm["tokens_per_s"],
        "dense_tokens_per_s": dense["tokens_per_s"],
        "speedup": arm["tokens_per_s"] / dense["tokens_per_s"],
        "prefill_ratio": arm["prefill_ms"] / dense["prefill_ms"],
    }


@torch.no_grad()
def measure_arm(model: nn.Module, ids: Tensor, benchmark: DecodeBenchmark, *, split: bool = True) -> dict[str, Any]:
    """Return what the loop measures of one model, dense, sparsified or quantised, after a prompt of `ids` `[1, n]`.

    Args:
        model, ids, benchmark: As for `run`.
        split: Time the parts of a token as well, which takes linears that are plain.

    Raises:
        ConfigError, UnsupportedModelError: See `DecodeLoop`.
    """
    found: dict[str, Any] = {"prefill_ms": _prefill(model, ids)}
    started = time.perf_counter()
    loop = DecodeLoop(model, ids, new_tokens=2 * benchmark.new_tokens)
    found["compile_s"] = time.perf_counter() - started
    loop.run(benchmark.new_tokens)
    if sparse_sites(model):
        reset_counters(model)
    per_token = _per_token(loop, benchmark.new_tokens, ids.device)
    found |= {"tokens_per_s": 1 / per_token, "time_us": per_token * 1e6}
    if sparse_sites(model):
        found |= _counted(model)
    found["split_us"] = _split(model, loop.linears, ids, per_token * 1e6) if split else {}
    del loop
    torch._dynamo.reset()
    gc.collect()
    if ids.is_cuda:
        torch.cuda.empty_cache()
    return found


def _per_token(loop: DecodeLoop, new_tokens: int, device: torch.device) -> float:
    """Return the seconds of a token: the median of several parts, as a machine that is shared stalls now and then."""
    times = []
    for part in range(PARTS):
        tokens = new_tokens * (part + 1) // PARTS - new_tokens * part // PARTS
        wait(device)
        started = time.perf_counter()
        loop.run(tokens)
        wait(device)
        if tokens:
            times.append((time.perf_counter() - started) / tokens)
    return statistics.median(times)


def _counted(model: nn.Module) -> dict[str, Any]:
    """Return what the tokens since the last reset realised."""
    sites = status(model)
    size = sum(site.size for site in sites)
    realised = sum((site.realised_sparsity or 0.0) * site.size for site in sites) / size
    return {
        "realised_sparsity": realised,
        "backend": ", ".join(dict.fromkeys(site.backend for site in sites)),
        "weights_read_by_ffn": {site.name: site.weights_read for site in sites},
    }


def _prefill(model: nn.Module, ids: Tensor) -> float:
    """Return the median ms of a prompt of as many tokens as `PREFILL` says, eager."""
    tokens, repeats = PREFILL[ids.device.type]
    prompt = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    times = []
    for _ in range(repeats):
        wait(ids.device)
        started = time.perf_counter()
        model(prompt, use_cache=False, logits_to_keep=1)
        wait(ids.device)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[2:])


def _split(model: nn.Module, groups: list[list[nn.Linear]], ids: Tensor, total: float) -> dict[str, float]:
    """Return µs of a token in FFNs, the linears of attention, the head, and all the rest.

    Each part is timed by itself, captured or recorded, with the kernels of the step and the inputs that the prompt's
    last token gave it; the rest is what remains of the total: scores, cache, norms, and the gaps between kernels.
    """
    sparse = sparse_sites(model)
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    inputs = _last_inputs(model, ids, [*sparse.values(), *(linear for group in groups for linear in group)])
    ffns = [] if sparse else find_ffns(model)
    # Of each dense FFN, gate and up in one group or one linear, and down.
    dense = [[group for group in groups if group[0] in set(model.get_submodule(ffn.name).modules())] for ffn in ffns]
    taken = {id(group[0]) for groups_ in dense for group in groups_} | {id(head)}
    attention = [group for group in groups if id(group[0]) not in taken]
    gated = torch.compile(_product, dynamic=False) if ids.is_cuda else _product

    def run_ffns() -> None:
        for module in sparse.values():
            module.sparse(inputs[id(module)][None])
        for ffn, (first, last) in zip(ffns, dense, strict=True):
            gated(_project(first, inputs), ffn.activation)
            _project(last, inputs)

    def run_linears() -> None:
        for group in attention:
            _project(group, inputs)

    steps = {"ffn": run_ffns, "attention_linears": run_linears, "head": lambda: largest(_project([head], inputs))}
    if not ids.is_cuda:
        steps = {name: recorded(step, everything=True) for name, step in steps.items()}
    parts = {name: step_time(step, ids.device) for name, step in steps.items()}
    return parts | {"rest": total - sum(parts.values())}


def _last_inputs(model: nn.Module, ids: Tensor, modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Return, by identity of the module, its input `[1, d]` at the last token of a prompt."""
    inputs: dict[int, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[id(module)] = arguments[0].reshape(-1, arguments[0].shape[-1])[-1:].clone()

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _product(both: Tensor, activation: str) -> Tensor:
    g, u = both.chunk(2, dim=-1)
    return ACTIVATIONS[activation](g) * u


def _project(group: list[nn.Linear], inputs: dict[int, Tensor]) -> Tensor:
    weights, biases = [linear.weight for linear in group], [linear.bias for linear in group]
    return torch.ops.countdown.project_one(inputs[id(group[0])], weights, biases)  # type: ignore[no-any-return]


def _generate(model: nn.Module, ids: Tensor, new_tokens: int) -> float:
    """Return tokens/s of Hugging Face's generate with a static cache, compiled as it compiles by itself."""
    speeds = []
    for _ in range(3):
        wait(ids.device)
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
        wait(ids.device)
        speeds.append(new_tokens / (time.perf_counter() - started))
    return speeds[-1]
