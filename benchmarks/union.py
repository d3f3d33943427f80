"""How many neurons some token of a batch needs: the union of active sets of tokens of different sequences.

    python benchmarks/union.py MODEL --text-dir DIR --output benchmarks/results/union-NAME.json

M-COUNTDOWN, weighting rms, thresholds; WikiText-2's test split, every token sparse. Per number of tokens and sparsity,
the mean over layers and over draws of that many tokens, each from a window of its own.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from countdown.calibration.calibrate import calibrate
from countdown.loading import Source, load_model, load_tokenizer
from countdown.methods import method
from countdown.modules import running, sparse_modules
from countdown.results import meta, write
from countdown.sparsify import restore_, sparsify_
from countdown.text import load_text, windows
from documents import commit

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
TOKENS = range(1, 9)
DRAWS = 64


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    source = Source.parse(arguments.model)
    model, tokenizer = load_model(source, device=arguments.device), load_tokenizer(source)
    valid, test = (load_text("wikitext2", s, text_dir=arguments.text_dir) for s in ("calibration", "evaluation"))
    profile = calibrate(model, tokenizer, valid, method("m-countdown", weighting="rms"), tokens=8192, progress=False)
    ids = windows(tokenizer, test.content, count=max(TOKENS))
    records = []
    for sparsity in SPARSITIES:
        sparsify_(model, profile, sparsity=sparsity)
        sets = _active_sets(model, ids)
        restore_(model)
        for tokens in TOKENS:
            union = _union(sets, tokens)
            records.append({"model": source.label, "method": "m-countdown", "weighting": "rms", "sparsity": sparsity})
            records[-1] |= {"tokens": tokens, "union": round(union, 4)}
            print(sparsity, tokens, union, flush=True)
    command = shlex.join(["python", "benchmarks/union.py", source.label])
    write(arguments.output, {"meta": meta(command, commit=commit()), "records": records})


@torch.no_grad()
def _active_sets(model: Any, ids: Tensor) -> Tensor:
    """Return the active sets of all tokens, bool [windows, layers, length, h]."""
    found: list[Tensor] = []

    def keep(module: Any, arguments: tuple[Tensor, ...]) -> None:
        active = module.active(arguments[0])
        found.append(active[0].cpu())

    hooks = [module.register_forward_pre_hook(keep) for module in sparse_modules(model).values()]
    with running(model, "all"):
        for window in ids:
            model(window[None].to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    stacked: Tensor = torch.stack(found).unflatten(0, (len(ids), -1))
    return stacked


def _union(sets: Tensor, tokens: int) -> float:
    generator = torch.Generator().manual_seed(tokens)
    shares = []
    for _ in range(DRAWS):
        chosen = torch.randperm(len(sets), generator=generator)[:tokens]
        places = torch.randint(sets.shape[2] // 2, sets.shape[2], (tokens,), generator=generator)
        some = torch.stack([sets[window, :, place] for window, place in zip(chosen, places, strict=True)])
        shares.append(some.any(dim=0).float().mean())
    return float(torch.stack(shares).mean())


if __name__ == "__main__":
    main()
