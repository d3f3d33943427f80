"""Whole decoding, dense and sparse in the same loop, and where a token's time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from countdown.benchmark import llama_cpp
from countdown.benchmark.arm import Arm, Timed, Times, free, measure, tokens_of
from countdown.benchmark.speedup import Speedup
from countdown.benchmark.timing import bandwidth, floor_rate, wait
from countdown.calibration.calibrate import calibrate
from countdown.config import check_choice
from countdown.cost import token_bytes
from countdown.loading import DTYPES, check_context
from countdown.methods import Method
from countdown.noise import quiet_imports
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe
from countdown.sites import Site, find_sites
from countdown.sparsify import sparse_twin

DENSE = "dense"
# How often Hugging Face's generate is timed.
GENERATED = 3
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
    with quiet_imports():
        from transformers import LlamaConfig, LlamaForCausalLM

    check_choice("--shape", shape, SHAPES)
    check_choice("dtype", dtype, DTYPES)
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**sizes, max_position_embeddings=131072, tie_word_embeddings=False, dtype=DTYPES[dtype])
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
        new_tokens: Tokens that are timed, at least.
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
    arms: Sequence[Method | Recipe | Profile],
    benchmark: DecodeBenchmark,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Yield a record of the dense model, one of each sparse one in the same loop, and those of others if asked for.

    Args:
        model: A dense model on a CUDA device or a CPU; left dense. Sparse ones are copies that share every weight
            with it but W_down and linears that are themselves sparse.
        arms: Profiles of it, or methods and recipes that are calibrated on random tokens, for random weights.
        benchmark: What to measure.
        progress: Show progress on stderr.
        say: Called with a line at the start of each step.

    Raises:
        ConfigError, UnsupportedModelError, ProfileError: See `DecodeLoop` and `sparsify_`.
    """
    device = next(model.parameters()).device
    if benchmark.llama_cpp:
        llama_cpp.check(model)
    check_context(model, benchmark.context + tokens_of(benchmark.new_tokens))
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, benchmark.context), generator=generator, dtype=torch.int64, device="cpu")
    ids = (ids if benchmark.prompt is None else benchmark.prompt).to(device)
    some = torch.randint(0, vocabulary, CALIBRATION, generator=generator, dtype=torch.int64, device="cpu")
    common = _common(model, benchmark) | {"vocab": vocabulary}
    profiles = [one if isinstance(one, Profile) else calibrated(model, one, some) for one in arms]
    by_name = {str(profile.recipe): profile for profile in profiles}
    dense: Times = {}
    rate = bandwidth(device).floor if device.type == "cuda" else None
    for group in _groups(model, by_name, ids, benchmark):
        say(f"preparing {', '.join(group)}")
        label = f"measuring {', '.join(group)}" if progress else ""
        with ExitStack() as stack:
            made = {name: make(stack) for name, make in group.items()}
            times, rates = measure(made, None if rate else floor_rate(device), label=label)
        dense = times.get(DENSE, dense)
        bytes_s = rate or statistics.median(rates)
        for name, arm in made.items():
            record = arm.record(times[name], dense)
            if isinstance(arm, Arm):
                sites = find_sites(model, by_name[name].kinds) if name in by_name else []
                record |= _against_floor(record, token_bytes(model, sites).total, sites, bytes_s)
            yield common | {"bandwidth": bytes_s} | _named(name, by_name) | record | _doubted(record)
        del made, arm
        free()
    if benchmark.generate:
        say("measuring Hugging Face's generate")
        yield common | {"run": "generate", "tokens_per_s": _generate(model, ids, benchmark.new_tokens)}


def _common(model: nn.Module, benchmark: DecodeBenchmark) -> dict[str, Any]:
    """Return what all records say."""
    first = next(model.parameters())
    return {
        "layers": model.config.get_text_config().num_hidden_layers,  # type: ignore[operator, union-attr]
        "dtype": str(first.dtype).removeprefix("torch."),
        "tokens": 1,
        "context": benchmark.context,
        "new_tokens": benchmark.new_tokens,
        "prompt": "random tokens" if benchmark.prompt is None else "text",
        **({"threads": torch.get_num_threads()} if first.device.type == "cpu" else {}),
    }


def _groups(
    model: nn.Module, profiles: Mapping[str, Profile], ids: Tensor, benchmark: DecodeBenchmark
) -> list[dict[str, Callable[[ExitStack], Timed]]]:
    """Return what makes each arm, by name; those of a group are measured in turn.

    On a CPU, what else runs on the machine comes and goes, so all are one group. A GPU may have no room for that, and
    nobody else works there.
    """

    def arm(make: Callable[[], nn.Module]) -> Callable[[ExitStack], Timed]:
        return lambda _: Arm(make(), ids, benchmark.new_tokens, prefill=True, split=True)

    arms = {DENSE: arm(lambda: model)} | {
        name: arm(partial(sparse_twin, model, profile)) for name, profile in profiles.items()
    }
    if benchmark.llama_cpp:
        arms |= llama_cpp.arms(model, ids, benchmark.new_tokens)
    return [{name: make} for name, make in arms.items()] if ids.is_cuda else [arms]


def _named(name: str, profiles: Mapping[str, Profile]) -> dict[str, Any]:
    """Return what a record says of the arm itself."""
    if name in profiles:
        return {"run": "sparse"} | profiles[name].recipe.record()
    return {"run": name if name == DENSE else llama_cpp.NAME}


def _against_floor(record: dict[str, Any], total: int, sites: Sequence[Site], rate: float) -> dict[str, Any]:
    """Return the bytes that a token of an arm reads, and how far it is from the time they take."""
    shares = record.pop("weights_read_by_site", {})
    own = sum(site.nbytes for site in sites if site.name in shares)
    read = sum(shares[site.name] * site.nbytes for site in sites if site.name in shares)
    floor = (total - own + read) / rate
    found = {"floor_us": floor * 1e6, "floor_share": floor * record["tokens_per_s"]}
    return found | ({"weights_read": read / own, "ceiling": total / (total - own + read)} if shares else {})


def _doubted(record: dict[str, Any]) -> dict[str, Any]:
    """Return why the speed-up of a record is not to be relied on, if it is not."""
    speedup = Speedup(record["speedup"], record["speedup_low"], record["speedup_high"])
    doubt = speedup.doubt(record.get("ceiling"))
    return {} if doubt is None else {"unreliable": doubt}


def calibrated(model: nn.Module, config: Method | Recipe, tokens: Tensor) -> Profile:
    """Return a profile made of tokens `[n, length]`, as good as any where only speed counts."""
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return calibrate(model, None, batch, config, progress=False)


def _generate(model: nn.Module, ids: Tensor, new_tokens: int) -> float:
    """Return tokens/s of Hugging Face's generate with a static cache, compiled as it compiles by itself.

    The median of what comes after two calls, in which it compiles.
    """
    speeds = []
    for _ in range(2 + GENERATED):
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
    return statistics.median(speeds[2:])
