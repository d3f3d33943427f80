"""How fast several answers are written at a time, dense and sparse.

    python benchmarks/together.py MODEL --output benchmarks/results/together-NAME.json
    python benchmarks/together.py --shape llama-3.1-8b --output benchmarks/results/together-NAME.json

80% of neurons skipped; prompts, and the text that thresholds are made of, are this project's docs, or random tokens for
random weights. In turn, round by round: the dense model, and sparse ones up to as many answers as by default and up
to 8.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

from countdown.engine.engine import MOST_SEQUENCES, Engine, Request
from countdown.joint import ALONE
from countdown.results import meta, write
from documents import commit, said
from models import add_model, loaded, sparse

DOCS = Path(__file__).parent.parent / "docs"
ANSWERS, PROMPT, NEW, ROUNDS = (1, 2, 4, 8), 64, 50, 4
METHODS, SPARSITY = ("m-countdown", "d-proxy"), 0.8
CALIBRATED, APART = 4096, 900


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    label, tokenizer, model = loaded(arguments)
    windows, ids = None, list(range(100, 100 + APART * MOST_SEQUENCES))
    if not arguments.shape:
        text = tokenizer((DOCS / "methods.md").read_text(encoding="utf-8"))["input_ids"]
        windows, ids = text[:CALIBRATED], text[CALIBRATED:]
    arms: list[tuple[dict[str, Any], nn.Module, int]] = [({"method": "dense"}, model, MOST_SEQUENCES)]
    for name in METHODS:
        twin = sparse(model, name, SPARSITY, windows)
        for up_to in sorted({Engine(twin, tokenizer).sparse_up_to, MOST_SEQUENCES}):
            arms.append(({"method": name, "sparsity": SPARSITY, "sparse_up_to": up_to}, twin, up_to))
    records = []
    for answers in ANSWERS:
        rates: list[list[float]] = [[] for _ in arms]
        for _ in range(ROUNDS):
            for found, (_, arm, up_to) in zip(rates, arms, strict=True):
                found.append(_rate(arm, tokenizer, ids, answers, up_to))
        for found, (about, *_) in zip(rates, arms, strict=True):
            share = statistics.median(one / dense for one, dense in zip(found, rates[0], strict=True))
            record = {"answers": answers, "tokens_per_s": statistics.median(found), "to_dense": share}
            records.append({"model": label, **about, **record})
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    command = shlex.join(["python", "benchmarks/together.py", *said(sys.argv[1:], arguments.model)])
    header = meta(command, commit=arguments.commit or commit())
    write(arguments.output, {"meta": header, "records": records})


def _rate(model: nn.Module, tokenizer: Any, ids: list[int], answers: int, up_to: int) -> float:
    """Return tokens/s of so many answers taken together, from the median of their steps."""
    times = []
    with Engine(model, tokenizer, sequences=answers, sparse_up_to=up_to) as engine:
        for n in range(answers):
            engine.start(Request(prompt=ids[APART * n : APART * n + PROMPT], max_new_tokens=NEW, ignore_eos=True))
        while engine.answers:
            started = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - started)
    # The first tokens came with the prompts, and one of the next steps joins the loops.
    return answers / statistics.median(times[2 + ALONE :])


if __name__ == "__main__":
    main()
