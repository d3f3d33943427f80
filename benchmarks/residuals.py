"""What of a dropped sum can be predicted, by predictor and by the bytes it reads, on text held out.

    python benchmarks/residuals.py MODEL --text-dir DIR --output benchmarks/results/residuals-NAME.json

For every FFN of a dense model and a few sparsities: r(x), what the dropped neurons add up to, decided by a copy of gate
and up in few bits. Predictors are fitted on 8,192 tokens of WikiText-2's validation split as `compensation.affine` fits
L, tokens weighed by 1 / ‖y‖², and judged on 4,096 others of its end: E v‖r - r̂‖² / E v‖y‖², a mean over FFNs. MODEL is
a hub id, folder or GGUF file; DIR holds WikiText-2's valid.txt and test.txt. --dither as for quality.py. Predictors:

    none         nothing is predicted
    mean         b alone
    affine       L x + b; L in 16 bits, and in 4
    low rank     L cut to a rank, in the metric of the inputs, at the bytes of L in 4 bits, half and twice as many; its
                 two factors in 16 bits, and in 4
    dropped      L x + M z + b, both in 4 bits: z, 64 and 256 sums, with random signs, of what the copy makes of the
                 dropped neurons' coefficients; the signs are taken to cost nothing
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.loading import Source, load_model, load_tokenizer
from countdown.modules import observed
from countdown.results import meta, write
from countdown.sites.ffn import find_ffns
from countdown.sums import Sum
from countdown.sums._base import product_of
from countdown.text import load_text, windows
from countdown.weights import Plain
from countdown.weights.symmetric import GROUP, SHRINK
from documents import commit, said
from quality import _dither

FITTED, JUDGED, WINDOW = 8192, 4096, 512
SPARSITIES, BITS = (0.5, 0.7, 0.8, 0.9), (4, 3, 2)
SUMS = (64, 256)
RIDGE, SMALL = 1.0, 1e-4
# Bits of an entry with its share of a scale.
BITS_EACH = {16: 16.0, 4: 4.0 + 16 / GROUP}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th FFN, which takes less time")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    source = Source.parse(arguments.model)
    model = load_model(source, dtype="float32", device="cpu")
    if arguments.dither:
        _dither(model)
    text = load_text("wikitext2", "calibration", text_dir=arguments.text_dir)
    ids = windows(load_tokenizer(source), text.content, length=WINDOW)
    rows = torch.cat([ids[: FITTED // WINDOW], ids[-(JUDGED // WINDOW) :]])
    sums: dict[tuple[Any, ...], list[float]] = {}
    found = find_ffns(model)[:: arguments.every]
    for number, site in enumerate(found, 1):
        for key, error in errors(site.sum, _inputs(model, site, rows)):
            sums.setdefault(key, []).append(error)
        print(f"{number} of {len(found)}", file=sys.stderr, flush=True)
    about = {"model": source.label, "dithered": arguments.dither, "sites": len(found)}
    names = ("bits", "sparsity", "predictor", "ffn_bytes", "rank")
    records = [about | dict(zip(names, key, strict=True)) | {"error": sum(of) / len(of)} for key, of in sums.items()]
    command = shlex.join(["python", "benchmarks/residuals.py", *said(sys.argv[1:], arguments.model)])
    header = meta(command, commit=commit())
    write(arguments.output, {"meta": header, "records": records})


@torch.no_grad()
def _inputs(model: Any, site: Any, rows: Tensor) -> Tensor:
    """Return the inputs of an FFN, float32 `[tokens, d]`."""
    kept: list[Tensor] = []

    def observe(_: Any, __: Sum, x: Tensor, ___: tuple[Tensor, ...]) -> None:
        kept.append(x.flatten(0, -2))

    with observed(model, [site], observe):
        for some in rows.split(4):
            model(input_ids=some, use_cache=False, logits_to_keep=1)
    return torch.cat(kept)


@torch.no_grad()
def errors(sum_: Sum, x: Tensor) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Yield bits, sparsity, predictor, its share of the FFN's bytes, and rank; and the error that it leaves."""
    fitted = slice(0, FITTED)
    down = sum_.weights[-1].values().T
    coefficients = product_of(sum_.project(x))
    y = coefficients @ down
    squares = y.square().sum(1, keepdim=True)
    v = 1 / (squares + SMALL * squares[fitted].mean())
    whole = float((v * squares)[FITTED:].sum())
    means = x[fitted].square().mean(0)
    all_bytes = 16.0 * sum(weight.shape[0] * weight.shape[1] for weight in sum_.weights)
    for bits in BITS:
        copies = [Plain([rounded(weight.values(), means, bits)]) for weight in sum_.weights[:-1]]
        proxy = product_of(sum_.with_weights(copies).project(x))
        for sparsity in SPARSITIES:
            threshold = proxy[fitted].abs().flatten().kthvalue(int(sparsity * FITTED * proxy.shape[1])).values
            inactive = proxy.abs() <= threshold
            r = (coefficients * inactive) @ down
            for name, read, rank, predicted in predictions(x, r, v, proxy * inactive):
                error = float((v * (r - predicted).square())[FITTED:].sum()) / whole
                yield (bits, sparsity, name, read / all_bytes, rank), error


def predictions(x: Tensor, r: Tensor, v: Tensor, dropped: Tensor) -> Iterator[tuple[str, float, int, Tensor]]:
    """Yield predictors' names, the bits that they read, ranks, and what they predict of `r`, `[tokens, d]`."""
    tokens, d = x.shape
    yield "none", 0.0, 0, torch.zeros_like(r)
    matrix, bias = solved(x[:FITTED], r[:FITTED], v[:FITTED])
    # What L x adds up to without its mean is not in b alone.
    yield "mean", 32.0 * d, 0, ((v * r)[:FITTED].sum(0) / v[:FITTED].sum()).expand(tokens, d)
    scale = ((v[:FITTED] * x[:FITTED].square()).sum(0) / v[:FITTED].sum()).sqrt().clamp(min=1e-9)
    four = BITS_EACH[4] * d * d
    yield "affine, 16 bits", 16.0 * d * d, d, x @ matrix.T + bias
    yield "affine, 4 bits", four, d, (x / scale) @ rounded(matrix * scale).T + bias
    u, s, w = torch.linalg.svd(matrix * scale, full_matrices=False)
    for bits in (16, 4):
        for times in (0.5, 1, 2):
            rank = int(times * four / (2 * d * BITS_EACH[bits]))
            if rank >= d:
                continue
            left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * w[:rank]
            if bits == 4:
                left, right = rounded(left), rounded(right)
            predicted = (x / scale) @ right.T @ left.T + bias
            yield f"low rank, {bits} bits", 2.0 * d * rank * BITS_EACH[bits], rank, predicted
    generator = torch.Generator().manual_seed(0)
    for count in SUMS:
        signs = torch.randint(0, 2, (dropped.shape[1], count), generator=generator, dtype=torch.float32) * 2 - 1
        both = torch.cat([x, dropped @ signs], dim=1)
        more, b = solved(both[:FITTED], r[:FITTED], v[:FITTED])
        size = ((v[:FITTED] * both[:FITTED].square()).sum(0) / v[:FITTED].sum()).sqrt().clamp(min=1e-9)
        left = [rounded((more * size)[:, part]) for part in (slice(0, d), slice(d, None))]
        yield f"dropped, {count}", BITS_EACH[4] * d * (d + count), d + count, (both / size) @ torch.cat(left, 1).T + b


def solved(x: Tensor, r: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return L and b of weighted least squares, as `compensation.affine` penalised."""
    ones = F.pad(x, (0, 1), value=1.0).double()
    gram = ones.T @ (v * ones)
    penalty = RIDGE * gram.diagonal().clone()
    penalty[-1] = 0
    found = torch.linalg.solve(gram + torch.diag(penalty), ones.T @ (v * r).double()).T.float()
    return found[:, :-1], found[:, -1]


def rounded(matrix: Tensor, weights: Tensor | None = None, bits: int = 4) -> Tensor:
    """Return a matrix in few bits as `weights.symmetric` has it, also in 2, a row's last group padded."""
    rows, columns = matrix.shape
    groups = F.pad(matrix, (0, -columns % GROUP)).view(rows, -1, GROUP)
    counted = torch.ones(columns) if weights is None else weights
    counted = F.pad(counted, (0, -columns % GROUP)).view(1, -1, GROUP)
    most = (2**bits - 1) / 2
    best, least = torch.zeros_like(groups), torch.full(groups.shape[:2], float("inf"))
    for shrink in SHRINK:
        scale = (groups.abs().amax(2, keepdim=True) * shrink / most).clamp(min=1e-12).half().float()
        value = ((groups / scale - 0.5).round() + 0.5).clamp(-most, most) * scale
        error = (counted * (value - groups).square()).sum(2)
        best = torch.where((error < least)[..., None], value, best)
        least = torch.minimum(error, least)
    return best.flatten(1)[:, :columns]


if __name__ == "__main__":
    main()
