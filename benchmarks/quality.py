"""What every method costs in quality: all decisions and weightings, 0.5 to 0.9, on WikiText-2.

    python benchmarks/quality.py MODEL --windows 16 --text-dir DIR --output benchmarks/results/quality-NAME.json

Calibrates each on 32,768 tokens of the validation split, evaluates on the first windows of the test split, every
token sparse. MODEL is a hub id, folder or GGUF file; DIR holds WikiText-2's valid.txt and test.txt.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from countdown.calibration.calibrate import calibrate_all
from countdown.calibration.text import Text, load_text, windows
from countdown.evaluation.evaluate import evaluate
from countdown.methods import Method, method, method_class, method_names
from countdown.models.loading import Source, load_model, load_tokenizer
from countdown.profile import Profile
from countdown.results import meta, write
from countdown.sparsify import restore_, sparsify_, status

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    """Run the sweep and write the results file."""
    arguments = _arguments()
    source = Source.parse(arguments.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="bfloat16", device=arguments.device)
    calibration, test = (
        load_text("wikitext2", split, text_dir=arguments.text_dir) for split in ("calibration", "evaluation")
    )
    profiles = calibrate_all(model, tokenizer, calibration, list(_methods()))
    ids = windows(tokenizer, test.content, count=arguments.windows)
    records = []
    for profile in profiles:
        for decision in profile.entries[0].method.decisions:
            chosen = profile.with_settings(decision=decision)
            records.append(_measure(model, chosen, ids, source, test))
            found = records[-1]
            print(
                f"{chosen.entries[0].method}: {found['perplexity']:.2f} at {found['realised_sparsity']:.4f}", flush=True
            )
    command = shlex.join(["python", "benchmarks/quality.py", source.label, *arguments.public])
    header = meta(command, commit=arguments.commit or _commit(), calibration=profiles[0].calibration)
    write(arguments.output, {"meta": header, "records": records})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--text-dir", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", help="where the checkout has no git history")
    arguments = parser.parse_args()
    arguments.public = ["--windows", str(arguments.windows)]
    return arguments


def _methods() -> Iterator[Method]:
    for name in method_names():
        for weighting in method_class(name).weightings:
            for sparsity in SPARSITIES:
                yield method(name, weighting=weighting, sparsity=sparsity)


def _measure(model: nn.Module, profile: Profile, ids: Any, source: Source, text: Text) -> dict[str, Any]:
    sparsify_(model, profile)
    result = evaluate(model, ids, progress=False)
    sites = status(model)
    restore_(model)
    config = profile.entries[0].method
    return {
        "model": source.label,
        "d": sites[0].d,
        "h": sites[0].h,
        "layers": len(sites),
        "vocab": model.config.vocab_size,  # type: ignore[union-attr]
        "dtype": "bfloat16",
        "device": str(next(model.parameters()).device),
        "method": config.name,
        "indicator": "exact",
        "decision": config.decision,
        "weighting": config.weighting,
        "allocation": "uniform",
        "sparsity": config.sparsity,
        "text": text.source,
        "windows": len(ids),
        **result.record(),
    }


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or sys.exit("no git history here: give --commit")


if __name__ == "__main__":
    main()
