"""Tokens per second of the passes over a text: dense prefill, evaluation's sparse pass, and calibration.

    python benchmarks/passes.py MODEL --device cpu --output benchmarks/results/passes-cpu-NAME.json

Dense and sparse passes run in the batches of `evaluate`, logits of every token included, in turn, round by round; the
share is the median over rounds of a round's ratio. The text of calibration is read once for each pass that a method
needs, so its rate is tokens of text per second, loading left out. Before anything is timed, a sparse model that drops
nothing must give the dense logits.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import countdown
from countdown.evaluation.evaluate import _batches
from countdown.methods import method
from countdown.modules import running
from countdown.profiles.profile import Profile
from countdown.results import meta, write
from countdown.text import WINDOW, windows
from documents import commit, said

METHODS = ("m-countdown", "cats", "d-countdown", "d-proxy", "teal")
DECISIONS = ("threshold", "topk")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, dense and sparse")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="where the checkout has no git history")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    checkout = arguments.commit or commit()
    model = countdown.from_pretrained(arguments.model, device=arguments.device)
    tokenizer = countdown.load_tokenizer(arguments.model)
    texts = [countdown.load_text("python-docs", split) for split in ("calibration", "evaluation")]
    rows = windows(tokenizer, texts[1].content, count=arguments.windows)
    windows(tokenizer, texts[0].content, count=arguments.tokens // WINDOW)  # is there as much
    command = shlex.join(["python", "benchmarks/passes.py", "MODEL", *said(sys.argv[1:], arguments.model)])
    records = []
    for name in arguments.methods:
        for record in _of_method(model, tokenizer, texts[0], rows, name, arguments):
            records.append({"model": Path(arguments.model).name, "device": str(model.device), **record})
            print(records[-1], flush=True)
            write(arguments.output, {"meta": meta(command, commit=checkout), "records": records})


def _of_method(
    model: Any, tokenizer: Any, text: Any, rows: Tensor, name: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    config = method(name, sparsity=arguments.sparsity)

    def calibrate(tokens: int) -> Profile:
        return countdown.calibrate(model, tokenizer, text, config, tokens=tokens, progress=False)

    calibrate(WINDOW)  # what a first call loads and compiles is not counted
    found: list[Profile] = []
    calibration = _timed(lambda: found.append(calibrate(arguments.tokens)))
    records: list[dict[str, Any]] = []
    for decision in (one for one in DECISIONS if one in config.decisions):
        times, batch, peak = _passes(model, found[0].with_settings(decision=decision), rows, arguments.rounds)
        dense, sparse = (statistics.median(of) for of in times)
        ratios = [one / other for one, other in zip(*times, strict=True)]
        records.append(
            {
                "method": name,
                "decision": decision,
                "sparsity": config.sparsity,
                "dtype": str(model.dtype).removeprefix("torch."),
                "tokens": rows.numel(),
                "batch_tokens": batch,
                "dense_tokens_per_s": rows.numel() / dense,
                "tokens_per_s": rows.numel() / sparse,
                "share_of_dense": statistics.median(ratios),
                "share_of_dense_low": min(ratios),
                "share_of_dense_high": max(ratios),
                "calibration_tokens": arguments.tokens,
                "calibration_tokens_per_s": arguments.tokens / calibration,
                "calibration_share_of_dense": arguments.tokens / calibration / (rows.numel() / dense),
                "peak_beside_bytes": peak,
            }
        )
    return records


@torch.inference_mode()
def _passes(
    model: Any, profile: Profile, rows: Tensor, rounds: int
) -> tuple[tuple[list[float], list[float]], int, int | None]:
    """Return the seconds of dense and sparse passes by round, tokens of the largest batch, and a GPU's bytes."""
    _check(model, profile, rows[:1].to(model.device))
    countdown.sparsify_(model, profile)
    try:
        batches = [batch.to(model.device) for batch in _batches(model, list(rows), "all")]

        def run(mode: str) -> None:
            with running(model, mode):
                for batch in batches:
                    model(batch, use_cache=False)

        run("dense")
        before = _memory(model.device)
        run("all")
        peak = None if before is None else torch.cuda.max_memory_allocated(model.device) - before
        times: tuple[list[float], list[float]] = [], []
        for round_ in range(rounds):
            for place in (0, 1) if round_ % 2 else (1, 0):
                times[place].append(_timed(partial(run, ("dense", "all")[place])))
        return times, max(batch.numel() for batch in batches), peak
    finally:
        countdown.restore_(model)


def _check(model: Any, profile: Profile, ids: Tensor) -> None:
    """Exit unless the model gives its dense logits where nothing is dropped, both with its weights laid out."""
    countdown.sparsify_(model, profile, sparsity=0.0, apply_to="all")
    with running(model, "dense"):
        expected = model(ids, use_cache=False).logits
    same = torch.equal(model(ids, use_cache=False).logits, expected)
    countdown.restore_(model)
    if not same:
        raise SystemExit("with nothing dropped, the sparse model does not give the dense logits")


def _memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _timed(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
