"""Tables of how one sparsity is divided: among linears, among FFNs and attention on one budget, and by R-Sparse's α."""

from __future__ import annotations

from typing import Any

from documents import load, row


def linears(name: str) -> str:
    """Return perplexity and KL of methods for linears under each allocation, a column for each sparsity."""
    document = load(name)
    records = {(r["method"], r["weighting"], r["allocation"], r["sparsity"]): r for r in document["records"]}
    sparsities = sorted({key[3] for key in records})
    lines = [row(["method", "allocation", *(f"{s:.0%}" for s in sparsities)])]
    lines.append(row(["---"] * 2 + ["---:"] * len(sparsities)))
    for method, weighting, allocation in sorted({key[:3] for key in records}, key=_order):
        found = [records[method, weighting, allocation, s] for s in sparsities]
        label = {"none": method, "shared-norm": "wina"}[weighting]
        lines.append(row([label, allocation, *(f"{r['perplexity']:.2f} ({r['kl']:.3f})" for r in found)]))
    dense = document["records"][0]["dense_perplexity"]
    return "\n".join(lines) + f"\n\nPerplexity (dense {dense:.2f}); in brackets, KL.\n" + _source(name, document)


def _order(key: tuple[str, ...]) -> tuple[int, int]:
    return ("none", "shared-norm").index(key[1]), ("uniform", "greedy", "global").index(key[2])


def budget(name: str) -> str:
    """Return perplexity and KL of one method, and of it with another on one budget, at equal bytes of a token."""
    document = load(name)
    records = document["records"]
    points = sorted({r["bytes_of_ffn_sparsity"] for r in records})
    lines = [row(["recipe", "allocation", *(f"bytes of FFNs at {s:.0%}" for s in points)])]
    lines.append(row(["---"] * 2 + ["---:"] * len(points)))
    for recipe, allocation in dict.fromkeys((r["recipe_name"], r["allocation"]) for r in records):
        found = {
            r["bytes_of_ffn_sparsity"]: r
            for r in records
            if (r["recipe_name"], r["allocation"]) == (recipe, allocation)
        }
        cells = (
            f"{r['perplexity']:.2f} ({r['kl']:.3f}), reads {r['token_read']:.1%}" for r in (found[s] for s in points)
        )
        lines.append(row([recipe, allocation, *cells]))
    dense = records[0]["dense_perplexity"]
    note = f"Perplexity (dense {dense:.2f}); in brackets, KL; the share of a whole token's weight bytes that was read."
    return "\n".join(lines) + f"\n\n{note}\n" + _source(name, document)


def alpha_search(name: str) -> str:
    """Return what the search for α found with each seed, and α of one value everywhere."""
    document = load(name)
    head = ["α", "seed", "linears with α = 1", "its samples", "other samples", "evaluated"]
    lines = [row(head), row(["---"] * 2 + ["---:"] * 4)]
    for r in document["records"]:
        if r["arm"] == "uniform":
            lines.append(row([f"{r['alpha_everywhere']:g} everywhere", "", "", "", "", f"{r['perplexity']:.2f}"]))
            continue
        pairs = (
            ("searched_perplexity", "searched_uniform_perplexity"),
            ("check_perplexity", "check_uniform_perplexity"),
        )
        seen = [f"{r[best] / r[one] - 1:+.1%}" for best, one in pairs]
        what = {"search": "searched", "random": "drawn at random as often"}[r["arm"]]
        lines.append(row([what, str(r["seed"]), f"{r['share_of_ones']:.0%}", *seen, f"{r['perplexity']:.2f}"]))
    first = document["records"][0]
    note = (
        f"Perplexity at {first['sparsity']:.0%} (dense {first['dense_perplexity']:.2f}); on samples of the calibration "
        "text, the change against α = 1 everywhere."
    )
    return "\n".join(lines) + f"\n\n{note}\n" + _source(name, document)


def _source(name: str, document: dict[str, Any]) -> str:
    meta, first = document["meta"], document["records"][0]
    hardware = meta["hardware"].get("gpu") or meta["hardware"]["cpu"]
    versions = f"torch {meta['versions']['torch']}, transformers {meta['versions']['transformers']}"
    return (
        f"\n{first['windows']} windows, {first['tokens']} scored tokens, calibrated on {meta['tokens']}; {hardware}, "
        f"{first['dtype']}, {versions}, commit {meta['commit'][:8]}; `benchmarks/results/{name}.json`.\n"
    )
