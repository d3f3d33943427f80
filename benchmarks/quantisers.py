"""Compares ways to quantise gate and up in few bits, by what proxies lose on a dithered model.

    python benchmarks/quantisers.py MODEL --text-dir DIR --output benchmarks/results/NAME.json

Inputs are those of 1024 tokens of WikiText-2's validation split, on which importance is measured too; every third layer
is looked at. For each form, at each sparsity: recall of the largest |s|, and the share of their Σ s² that those a proxy
chooses lack.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.loading import Source, load_model, load_tokenizer
from countdown.modules import observed
from countdown.results import meta, write
from countdown.sites.ffn import find_ffns
from countdown.sites.gated import GatedFFN
from countdown.sums import Sum
from countdown.sums.activations import ACTIVATIONS
from countdown.text import load_text, windows
from countdown.weights.symmetric import SHRINK, round_tokens
from documents import commit
from quality import _dither

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
EVERY = 3


@dataclass(frozen=True)
class Form:
    """A way to quantise.

    Args:
        bits: Of a level.
        group: Weights that share a scale.
        levels: `asymmetric` (a scale and a zero), `symmetric` (zero is a level), or `half-step` (±½, ±1½, ...).
        search: Whether shrunken ranges are tried, and what an error costs: `none`, `plain`, or `importance`.
    """

    bits: int
    group: int
    levels: str
    search: str

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight with its share of scale and zero."""
        return self.bits + (32 if self.levels == "asymmetric" else 16) / self.group


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    source = Source.parse(arguments.model)
    model = load_model(source, dtype="float32", device="cpu")
    _dither(model)
    model.float()
    text = load_text("wikitext2", "calibration", text_dir=arguments.text_dir)
    ids = windows(load_tokenizer(source), text.content, count=2)
    inputs: dict[str, list[Tensor]] = {}

    def keep(site: Any, _: Sum, x: Tensor, __: tuple[Tensor, ...]) -> None:
        inputs.setdefault(site.name, []).append(x.flatten(0, -2))

    ffns = find_ffns(model)[::EVERY]
    with torch.no_grad(), observed(model, ffns, keep):
        for window in ids:
            model(window[None], use_cache=False, logits_to_keep=1)
    command = shlex.join(["python", "benchmarks/quantisers.py", source.label])
    header = meta(command, commit=commit(), tokens=ids.numel())
    records = []
    for form in forms():
        losses = [lost(ffn, torch.cat(inputs[ffn.name]), form) for ffn in ffns]
        for sparsity in SPARSITIES:
            means = {key: sum(loss[sparsity][key] for loss in losses) / len(losses) for key in ("recall", "lost")}
            records.append(
                {"model": source.label, "windows": len(ids), "tokens": ids.numel(), "dtype": "float32"}
                | {**asdict(form), "bits_per_weight": form.bits_per_weight, "sparsity": sparsity, **means}
            )
        print(form, f"{records[-3]['lost']:.3%} at {records[-3]['sparsity']}", flush=True)
        write(arguments.output, {"meta": header, "records": records})


def forms() -> Iterator[Form]:
    """Yield what is compared."""
    for bits, group in itertools.product((4, 3), (32, 64, 128)):
        for levels, search in (
            ("asymmetric", "none"),
            ("asymmetric", "importance"),
            ("symmetric", "none"),
            ("symmetric", "importance"),
            ("half-step", "plain"),
            ("half-step", "importance"),
        ):
            yield Form(bits, group, levels, search)


@torch.no_grad()
def lost(ffn: GatedFFN, x: Tensor, form: Form) -> dict[float, dict[str, float]]:
    """Return recall and lost Σ s² of one FFN by sparsity."""
    act = ACTIVATIONS[ffn.activation]
    gate, up = (weight.values() for weight in ffn.sum.weights[:2])
    importance = x.square().mean(dim=0)
    rounded = round_tokens(x)
    exact = (act(x @ gate.t()) * (x @ up.t())).abs()
    proxy = (
        act(rounded @ quantised(gate, importance, form).t()) * (rounded @ quantised(up, importance, form).t())
    ).abs()
    found = {}
    for sparsity in SPARSITIES:
        keep = exact.shape[1] - int(sparsity * exact.shape[1])
        best, chosen = exact.topk(keep).indices, proxy.topk(keep).indices
        mass, kept = exact.gather(1, best).square().sum(), exact.gather(1, chosen).square().sum()
        is_chosen = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, chosen, True)
        recall = is_chosen.gather(1, best).float().mean()
        found[sparsity] = {"recall": float(recall), "lost": float(1 - kept / mass)}
    return found


def quantised(weight: Tensor, importance: Tensor, form: Form) -> Tensor:
    """Return the weights that a form keeps, float32 `[h, d]`."""
    h, d = weight.shape
    padding = -d % form.group
    values = F.pad(weight.float(), (0, padding)).view(h, -1, form.group)
    cost = F.pad(importance, (0, padding)).view(1, -1, form.group) if form.search == "importance" else torch.ones(1)
    best, least = values, torch.full(values.shape[:2], torch.inf)
    for shrink in SHRINK if form.search != "none" else (1.0,):
        tried = _rounded(values, shrink, form)
        error = ((tried - values).square() * cost).sum(dim=-1)
        better = error < least
        best, least = torch.where(better[..., None], tried, best), torch.where(better, error, least)
    return best.reshape(h, -1)[:, :d]


def _rounded(values: Tensor, shrink: float, form: Form) -> Tensor:
    half = 2 ** (form.bits - 1)
    if form.levels == "asymmetric":
        low, high = shrink * values.amin(-1, keepdim=True), shrink * values.amax(-1, keepdim=True)
        scale, low = _float16((high - low) / (2 * half - 1)), low.half().float()
        return ((values - low) / scale).round().clamp(0, 2 * half - 1) * scale + low
    offset = 0.5 if form.levels == "half-step" else 0.0
    scale = _float16(shrink * values.abs().amax(-1, keepdim=True) / (half - 1 + offset))
    return ((values / scale - offset).round().clamp(-half, half - 1) + offset) * scale


def _float16(scale: Tensor) -> Tensor:
    return scale.half().float().clamp(min=2**-24)


if __name__ == "__main__":
    main()
