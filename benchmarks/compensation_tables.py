"""Tables about compensation, for `tables.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from documents import load, table

MODELS = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma-3-270M", "qwen2.5": "Qwen2.5-Coder-0.5B"}
TEXTS = {"wikitext2": "WikiText-2", "python-docs": "Python's documentation"}


def rises(names: Sequence[str]) -> str:
    """Return how far perplexity rises by model, method and calibration text, with and without what this adds."""
    rows, notes = [], []
    sparsities = sorted({r["sparsity"] for name in names for r in _records(name)})
    for name in names:
        records = _records(name)
        rows.append([f"{MODELS[name]}, dense {records[0]['dense_perplexity']:.2f}", "", *[""] * len(sparsities)])
        by_row: dict[tuple[str, str], dict[float, str]] = {}
        for r in records:
            row = by_row.setdefault((_method(r), TEXTS[r["calibrated_on"][0]]), {})
            row[r["sparsity"]] = f"{r['perplexity'] / r['dense_perplexity'] - 1:+.1%} ({r['weights_read']:.1%})"
        rows += [[*row, *(found.get(s, "") for s in sparsities)] for row, found in by_row.items()]
        meta = load(f"quality-compensation-{name}")["meta"]
        note = f" ({meta['note']})" if "note" in meta else ""
        notes.append(
            f"{MODELS[name]}: {records[0]['windows']} windows, {meta['tokens']:,} tokens of calibration, commit "
            f"{meta['commit'][:8]}{note}, `benchmarks/results/quality-compensation-{name}.json`"
        )
    head = ["", "calibrated on", *(f"{s:.0%}" for s in sparsities)]
    return table(head, rows, left=2) + (
        "\nRise of perplexity on WikiText-2 over dense, every token sparse; in brackets, weights read of FFNs.\n"
        f"{'; '.join(notes)}.\n"
    )


def harm(name: str) -> str:
    """Return by method and sparsity on how many kinds of text what is predicted makes KL larger."""
    document = load(name)
    by_case: dict[tuple[str, float], dict[str, dict[str, float]]] = {}
    for r in document["records"]:
        if r["ridge"] == r["scale"] == 1:
            kinds = by_case.setdefault((_method(r | {"compensate": "none"}), r["sparsity"]), {})
            kinds.setdefault(r["text"], {})[r["compensate"]] = r["kl"]
    rows = []
    for (method, sparsity), kinds in sorted(by_case.items()):
        ratios = [kl["affine"] / kl["none"] for kl in kinds.values() if len(kl) == 2]
        worse = sum(ratio > 1.05 for ratio in ratios)
        figures = (f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}", str(worse))
        rows.append([method, f"{sparsity:.0%}", str(len(ratios)), *figures])
    meta = document["meta"]
    head = ["", "skipped", "kinds of text", "KL with over without, median", "largest", "kinds with 5% more or worse"]
    return table(head, rows) + f"\nCommit {meta['commit'][:8]}, {meta['command']}; `benchmarks/results/{name}.json`.\n"


def shrinkage(name: str) -> str:
    """Return KL by what share of the least squares is taken, over that with nothing predicted."""
    document = load(name)
    by_row: dict[tuple[str, str, str, float], dict[float, float]] = {}
    for r in document["records"]:
        row = _method(r | {"compensate": "none"}), TEXTS[r["calibrated_on"][0]], TEXTS[r["text"]], r["sparsity"]
        by_row.setdefault(row, {})[r["shrinkage"]] = r["kl"]
    shares = sorted({r["shrinkage"] for r in document["records"]} - {0.0})
    rows = [
        [*row[:3], f"{row[3]:.0%}", *(f"{found[share] / found[0.0]:.3f}" for share in shares)]
        for row, found in by_row.items()
    ]
    head = ["", "calibrated on", "scored on", "skipped", *(f"κ {share:g}" for share in shares)]
    return table(head, rows, left=3) + f"\n{_source(name, document)}"


def residuals(name: str) -> str:
    """Return what is left of a dropped sum by predictor, with the bytes that it reads."""
    document = load(name)
    records = document["records"]
    sparsities = sorted({r["sparsity"] for r in records})
    by_row: dict[tuple[int, str, int, float], dict[float, float]] = {}
    for r in records:
        by_row.setdefault((r["bits"], r["predictor"], r["rank"], r["ffn_bytes"]), {})[r["sparsity"]] = r["error"]
    rows = []
    for (bits, predictor, rank, bytes_), found in by_row.items():
        named = f"{predictor}, rank {rank}" if predictor.startswith("low rank") else predictor
        rows.append([f"{bits}", named, f"{bytes_:.1%}", *(f"{found[s]:.1%}" for s in sparsities)])
    head = ["copy's bits", "predicted by", "bytes of the FFN", *(f"{s:.0%}" for s in sparsities)]
    return table(head, rows, left=2) + f"\n{_source(name, document)}"


def _source(name: str, document: dict[str, Any]) -> str:
    meta, model = document["meta"], document["records"][0]["model"]
    return f"{model}, commit {meta['commit'][:8]}; `{meta['command']}`; `benchmarks/results/{name}.json`.\n"


def _records(name: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = load(f"quality-compensation-{name}")["records"]
    return records


def _method(record: dict[str, Any]) -> str:
    weighting = "" if record["weighting"] == "none" else f" × {record['weighting']}"
    look = ", second look" if record.get("second_look") else ""
    return f"`{record['method']}`{weighting}{look}" + (" + affine" if record["compensate"] == "affine" else "")
