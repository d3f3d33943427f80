"""Does the search for α of r-sparse pay? Searched, drawn at random as often, and α = 1, on WikiText-2.

    python benchmarks/alpha_search.py MODEL --text-dir DIR --seeds 0 1 2 --jobs 6 --output benchmarks/results/NAME.json

Every arm searches on WikiText-2's validation split, calibrates on 32,768 tokens of it, and is scored on the first
windows of the test split. `random` draws as many candidates as `search` tries in all its generations and keeps the
best. What is scored is the best candidate, also where other samples refuse it (`taken` is false then). Arms run
side by side, each in a process of its own with a model of its own (--jobs).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from countdown.calibration.evolution import SearchSettings
from countdown.calibration.search import search_alpha
from countdown.methods import method
from countdown.results import meta, write
from documents import commit
from quality import TOKENS, Bench

# α of the same value everywhere, to compare with.
UNIFORM = (1.0, 0.98, 0.95, 0.9)


def main() -> None:
    """Run all arms and write the results file."""
    arguments = _arguments()
    arms: list[dict[str, Any]] = [{"arm": "uniform", "alpha_everywhere": alpha} for alpha in UNIFORM]
    arms += [{"arm": arm, "seed": seed} for seed in arguments.seeds for arm in ("search", "random")]
    settings = vars(arguments) | {"dither": False, "prompt_tokens": None, "tokens": TOKENS}
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=spawned) as pool:
        records = list(pool.map(_measured, [settings] * len(arms), arms))
    command = shlex.join(["python", "benchmarks/alpha_search.py", records[0]["model"], *arguments.public])
    write(
        arguments.output,
        {"meta": meta(command, commit=arguments.commit or commit(), tokens=TOKENS), "records": records},
    )


def _measured(settings: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    bench = Bench.of(argparse.Namespace(**settings))
    config: Any = method("r-sparse", sparsity=settings["sparsity"])
    about: dict[str, Any] = {}
    if arm["arm"] == "uniform":
        config = method("r-sparse", sparsity=settings["sparsity"], alpha=arm["alpha_everywhere"])
    else:
        config, about = _searched(bench, config, arm)
    profile = bench.calibrated(config)
    record = bench.measured(profile, **arm, **about)
    print(json.dumps({key: record[key] for key in (*arm, *about, "perplexity", "dense_perplexity")}), flush=True)
    return record


def _searched(bench: Bench, config: Any, arm: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    usual = SearchSettings(seed=arm["seed"])
    # One generation is drawn at random.
    drawn = SearchSettings(population=usual.evaluations, generations=1, seed=arm["seed"])
    started = time.perf_counter()
    how = {"search": usual, "random": drawn}[arm["arm"]]
    found = search_alpha(bench.model, bench.tokenizer, bench.valid, config, settings=how, progress=False)
    alphas = [value for _, value in found.best.alpha]  # type: ignore[union-attr]
    return found.best, {
        "evaluations": found.evaluations,
        "search_s": round(time.perf_counter() - started, 1),
        "taken": found.holds,
        "share_of_ones": sum(value == 1 for value in alphas) / len(alphas),
        "searched_perplexity": found.perplexity,
        "searched_uniform_perplexity": found.uniform_perplexity,
        "check_perplexity": found.check_perplexity,
        "check_uniform_perplexity": found.check_uniform_perplexity,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--text-dir", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", help="where the checkout has no git history")
    arguments = parser.parse_args()
    seeds = [str(seed) for seed in arguments.seeds]
    arguments.public = ["--sparsity", str(arguments.sparsity), "--seeds", *seeds, "--windows", str(arguments.windows)]
    return arguments


if __name__ == "__main__":
    main()
