"""How fast a model decodes while other processes take the cores.

python benchmarks/busy_cores.py MODEL --output benchmarks/results/busy-cores-NAME.json

The recorded loop on as many threads as torch has, the same on one thread, and llama.cpp in bf16 where it is installed:
in turn, round by round, alone and beside 1, 2, ... busy processes. Ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from countdown.benchmark import llama_cpp
from countdown.benchmark.speedup import paired
from countdown.decoding import DecodeLoop
from countdown.errors import ConfigError
from countdown.loading import Source, load_model
from countdown.results import meta, write
from documents import commit

PROMPT = torch.arange(1, 17)[None]
DEFAULT, ONE, OTHER = "default", "one thread", "llama.cpp BF16"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--busy", type=int, default=2, help="busy processes at most")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=25, help="tokens of a round")
    arguments = parser.parse_args()
    tokens = (arguments.busy + 1) * (arguments.rounds + 1) * arguments.steps
    runs = arms(arguments.model, tokens, arguments.steps)
    records = []
    for busy in range(arguments.busy + 1):
        with busy_processes(busy):
            for run in runs.values():
                run()
            times = {name: list[float]() for name in runs}
            for turn in range(arguments.rounds):
                # Another begins each round: what one leaves behind would always slow the same one.
                for name in turned(list(runs), turn):
                    started = time.perf_counter()
                    runs[name]()
                    times[name].append(time.perf_counter() - started)
        records += [record(arguments, busy, name, times) for name in runs]
    header = meta("python benchmarks/busy_cores.py MODEL", commit=commit())
    write(arguments.output, {"meta": header, "records": records})


def arms(model: str, tokens: int, steps: int) -> dict[str, Callable[[], object]]:
    """Return, by name, what makes the next `steps` tokens."""
    loaded = load_model(Source.parse(model), device="cpu")
    threads = torch.get_num_threads()
    loop = DecodeLoop(loaded, PROMPT, new_tokens=tokens)
    torch.set_num_threads(1)
    alone = DecodeLoop(loaded, PROMPT, new_tokens=tokens)
    torch.set_num_threads(threads)
    runs: dict[str, Callable[[], object]] = {DEFAULT: lambda: loop.run(steps), ONE: lambda: alone.run(steps)}
    try:
        llama_cpp.check(loaded)
    except ConfigError as error:
        print(error, file=sys.stderr)
    else:
        other = llama_cpp.Decoding(loaded, PROMPT[0].tolist(), tokens, OTHER.split()[1])
        runs[OTHER] = lambda: other.run(steps)
    return runs


def turned(names: list[str], turn: int) -> list[str]:
    """Return the names with another one first each turn, and the other way round every second time."""
    first = turn // 2 % len(names)
    order = names[first:] + names[:first]
    return order if turn % 2 else order[::-1]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within the context, so many other processes want a core each."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def record(arguments: argparse.Namespace, busy: int, name: str, times: dict[str, list[float]]) -> dict[str, object]:
    """Return what was measured of one arm."""
    rates = sorted(arguments.steps / seconds for seconds in times[name])
    found = {
        "model": Path(arguments.model).name,
        "busy": busy,
        "arm": name,
        "tokens_per_s": median(rates),
        "slowest_tokens_per_s": rates[0],
        "fastest_tokens_per_s": rates[-1],
        "speedup_over_one_thread": paired(times[ONE], times[name]).value,
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
