"""What a longer context costs a token: tokens/s, attention's share of it, and memory.

    python benchmarks/contexts.py --shape llama-3.1-8b [--method d-proxy --sparsity 0.8] --output FILE

Random weights, and random keys and values in place of those of a long prompt: what they are does not change what a step
takes. Attention is timed by itself, over the caches of all layers, in the kernels of the step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countdown.benchmark.arm import free, token_run
from countdown.benchmark.decode import SHAPES, calibrated, random_model
from countdown.benchmark.timing import timed
from countdown.decoding import DecodeLoop
from countdown.loading import resolve_device
from countdown.methods import method
from countdown.replay import recorded
from countdown.results import meta, write
from countdown.sparsify import sparsify_
from documents import commit, said

CONTEXTS = (512, 4096, 16384, 32768)
PROMPT, TOKENS, ROUNDS = 64, 16, 9


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--method")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    model = random_model(arguments.shape, device)
    about: dict[str, Any] = {"model": arguments.shape, "dtype": "bfloat16", "method": "dense"}
    if arguments.method:
        about |= {"method": arguments.method, "sparsity": arguments.sparsity}
        _sparsify(model, arguments, device)
    records = []
    for context in CONTEXTS:
        records.append(about | measured(model, context, device))
        print(json.dumps(records[-1]), file=sys.stderr, flush=True)
        free()
    command = shlex.join(["python", "benchmarks/contexts.py", *said(sys.argv[1:])])
    header = meta(command, commit=arguments.commit or commit())
    write(arguments.output, {"meta": header, "records": records})


@torch.no_grad()
def measured(model: Any, context: int, device: torch.device) -> dict[str, Any]:
    """Return what a token takes behind so many."""
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device=device)
    steps = 1 + (1 + ROUNDS) * (1 + TOKENS)
    # A prompt as short as this, and the rest of the cache filled in behind it.
    loop = DecodeLoop(model, ids, new_tokens=steps, room=context + steps)
    loop.run(1)
    for layer in loop.cache.layers:
        for held in (layer.keys, layer.values):
            held[:, :, PROMPT:context].normal_()
        layer.cumulative_length.fill_(context)
    for positions in loop._positions:
        positions.fill_(context)
    run = token_run(loop.run, TOKENS, device)
    token = statistics.median([run() for _ in range(1 + ROUNDS)][1:])
    attention = timed(_attention(model, loop, context, device), device)
    # In pairs, of which the second counts: threads are awake then.
    alone = statistics.median([attention() for _ in range(2 * ROUNDS)][1::2])
    cache = sum(held.nbytes for layer in loop.cache.layers for held in (layer.keys, layer.values))
    return {
        "context": context,
        "tokens_per_s": 1e6 / token,
        "token_us": token,
        "attention_us": alone,
        "cache_bytes": cache,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def _attention(model: Any, loop: DecodeLoop, context: int, device: torch.device) -> Any:
    """Return a step through the attention of all layers."""
    heads = model.config.num_attention_heads
    keys = loop.cache.layers[0].keys
    q = torch.randn((1, heads, 1, keys.shape[3]), device=device, dtype=keys.dtype)
    mask = (torch.arange(keys.shape[2], device=device) <= context).view(1, 1, 1, -1)

    def step() -> None:
        for layer in loop.cache.layers:
            torch.ops.countdown.attend_one(q, layer.keys, layer.values, mask, keys.shape[3] ** -0.5)

    return step if device.type == "cuda" else recorded(step, everything=True)


def _sparsify(model: nn.Module, arguments: argparse.Namespace, device: torch.device) -> None:
    ids = torch.randint(0, model.config.vocab_size, (2, 512), device=device)  # type: ignore[union-attr, arg-type]
    sparsify_(model, calibrated(model, method(arguments.method, sparsity=arguments.sparsity), ids))


if __name__ == "__main__":
    main()
