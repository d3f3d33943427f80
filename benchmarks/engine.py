"""The engine against the bare loop: speed greedy and sampled, the first token, and its memory.

    python benchmarks/engine.py MODEL --output benchmarks/results/engine-X.json
    python benchmarks/engine.py --shape llama-3.1-8b --method m-countdown --method d-proxy --output ...

In turn, round by round, of the dense model and of a sparse one by each method: the decode loop, the engine greedy and
sampled in several ways, transformers' prefill and the engine's first token. The first token before anything is traced
is that of this process; whether kernels were cached by another is said by --cached.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countdown.benchmark.arm import free
from countdown.benchmark.timing import wait
from countdown.decoding import DecodeLoop
from countdown.engine.engine import Engine, Request
from countdown.engine.sampling import Sampling
from countdown.modules import sparse_modules
from countdown.results import meta, write
from countdown.sparsify import realised_sparsity, reset_counters
from documents import commit, said
from models import add_model, loaded, sparse

PROMPT, LONG, NEW, ROUNDS = 64, 512, 64, 12
SAMPLED = {
    "sampled": Sampling(temperature=0.7, top_p=0.9, top_k=0, seed=0),
    "sampled, top-k 1": Sampling(temperature=0.7, top_k=1, seed=0),
    "sampled, top-k": Sampling(temperature=0.7, top_k=50, seed=0),
    "sampled, top-k and top-p": Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=0),
    "sampled, penalties": Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.1, seed=0),
    "logprobs": Sampling(logprobs=5),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--cached", action="store_true", help="kernels were compiled by another process before")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    label, tokenizer, model = loaded(arguments)
    ids = tokenizer(" ".join(str(n) for n in range(1000)))["input_ids"]
    about = {"model": label, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    records = []
    for name in ("dense", *arguments.method):
        arm = model if name == "dense" else sparse(model, name, arguments.sparsity)
        how = {"method": name} | ({"sparsity": arguments.sparsity} if name != "dense" else {})
        for record in alone(arm, tokenizer, ids, SAMPLED):
            if record["arm"].startswith("first token"):
                record["cached"] = arguments.cached
            records.append(about | how | record)
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
        del arm
        free()
    command = shlex.join(["python", "benchmarks/engine.py", *said(sys.argv[1:], arguments.model)])
    write(arguments.output, {"meta": meta(command, commit=arguments.commit or commit()), "records": records})


def alone(model: nn.Module, tokenizer: Any, ids: list[int], sampled: dict[str, Sampling]) -> Iterator[dict[str, Any]]:
    """Yield what the engine does by itself."""
    device = next(model.parameters()).device
    before = _allocated(device)
    started = time.perf_counter()
    engine = Engine(model, tokenizer)
    next(engine.stream(Request(prompt=ids[:PROMPT], max_new_tokens=NEW)))
    yield {"arm": "first token, nothing traced", "prompt": PROMPT, "seconds": time.perf_counter() - started}
    found = _in_turn(model, engine, ids, sampled)
    speeds = {"loop": "", "engine, greedy": "loop"} | {f"engine, {name}": "engine, greedy" for name in sampled}
    for name, of in speeds.items():
        record = {"arm": name, "prompt": PROMPT, "new_tokens": NEW, "tokens_per_s": statistics.median(found[name])}
        # Texts differ in what they skip: only the first and "top-k 1" write the same.
        record |= _sparsity(model, engine, ids, sampled.get(name.removeprefix("engine, "), Sampling()))
        yield record | _compared(found, name, of, "share")
    for name, of in (("prefill", ""), ("engine, first token", "prefill")):
        record = {"arm": name, "prompt": LONG, "seconds": statistics.median(found[name])}
        yield record | _compared(found, name, of, "ratio")
    held = _allocated(device)
    engine.close()
    if device.type == "cuda":
        gc.collect()
        yield {"arm": "memory", "before": before, "held": held, "closed": _allocated(device)}


def _in_turn(model: nn.Module, engine: Engine, ids: list[int], sampled: dict[str, Sampling]) -> dict[str, list[float]]:
    """Return what each arm measured, round by round."""
    loop = DecodeLoop(model, torch.tensor([ids[:PROMPT]]), new_tokens=NEW, room=1024)
    runs: dict[str, Callable[[], float]] = {
        "loop": lambda: _loop_rate(loop, ids[:PROMPT]),
        "engine, greedy": lambda: _rate(engine, ids[:PROMPT], Sampling()),
        "prefill": lambda: _prefill(model, ids[:LONG]),
        "engine, first token": lambda: _first(engine, ids[:LONG]),
    }
    for name, sampling in sampled.items():
        runs[f"engine, {name}"] = partial(_rate, engine, ids[:PROMPT], sampling)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + ROUNDS):
        # Each round begins with another arm: what comes after a long prompt finds the device warmer.
        first = number % len(runs)
        for name, run in [*runs.items()][first:] + [*runs.items()][:first]:
            one = run()
            if number:  # in the first, kernels are compiled
                found[name].append(one)
    return found


def _compared(found: dict[str, list[float]], name: str, of: str, what: str) -> dict[str, Any]:
    """Return how it is to another arm, round by round."""
    if not of:
        return {}
    return {what: statistics.median(a / b for a, b in zip(found[name], found[of], strict=True)), "of": of}


def _sparsity(model: nn.Module, engine: Engine, ids: list[int], sampling: Sampling) -> dict[str, Any]:
    """Return the share of neurons that a text skips, of a sparse model."""
    if not sparse_modules(model):
        return {}
    reset_counters(model)
    _rate(engine, ids[:PROMPT], sampling)
    return {"realised_sparsity": realised_sparsity(model)}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _rate(engine: Engine, prompt: list[int], sampling: Sampling) -> float:
    times = []
    for _ in engine.stream(Request(prompt=prompt, max_new_tokens=NEW, sampling=sampling, ignore_eos=True)):
        times.append(time.perf_counter())
    return (len(times) - 1) / (times[-1] - times[0])


def _loop_rate(loop: DecodeLoop, prompt: list[int]) -> float:
    device = loop.token.device
    loop.restart(torch.tensor([prompt]), new_tokens=NEW)
    loop.run(1)
    wait(device)
    started = time.perf_counter()
    loop.run(NEW - 1)
    wait(device)
    return (NEW - 1) / (time.perf_counter() - started)


@torch.no_grad()
def _prefill(model: Any, prompt: list[int]) -> float:
    device = model.device
    wait(device)
    started = time.perf_counter()
    model(torch.tensor([prompt], device=device), logits_to_keep=1, use_cache=True)
    wait(device)
    return time.perf_counter() - started


def _first(engine: Engine, prompt: list[int]) -> float:
    started = time.perf_counter()
    next(engine.stream(Request(prompt=prompt, max_new_tokens=2)))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
