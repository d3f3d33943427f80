"""Tables about compensation, for `tables.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from documents import load, table

MODELS = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma-3-270M", "qwen": "Qwen2.5-Coder-0.5B"}
TEXTS = {"wikitext2": "WikiText-2", "python-docs": "Python's documentation"}


def rises(names: Sequence[str]) -> str:
    """Return how far perplexity rises without and with what is predicted, by model, method and calibration text."""
    rows, notes = [], []
    sparsities = sorted({r["sparsity"] for name in names for r in _records(name)})
    for name in names:
        records = _records(name)
        dense = records[0]["dense_perplexity"]
        rows.append([f"{MODELS[name]}, dense {dense:.2f}", "", *[""] * len(sparsities)])
        for method, seen in dict.fromkeys((r["method"], r["calibrated_on"][0]) for r in records):
            found = {
                (r["sparsity"], r["compensate"]): r
                for r in records
                if (r["method"], r["calibrated_on"][0]) == (method, seen)
            }
            cells = [_cell(found.get((s, "none")), found.get((s, "affine"))) for s in sparsities]
            rows.append([f"`{method}`{_weighting(records, method)}", TEXTS[seen], *cells])
        meta = load(f"quality-compensation-{name}")["meta"]
        notes.append(
            f"{MODELS[name]}: {records[0]['windows']} windows, {meta['tokens']:,} tokens of calibration, commit "
            f"{meta['commit'][:8]}, `benchmarks/results/quality-compensation-{name}.json`"
        )
    head = ["", "calibrated on", *(f"{s:.0%}" for s in sparsities)]
    return table(head, rows, left=2) + (
        "\nRise of perplexity on WikiText-2 over dense, every token sparse: as published → with `affine`; in brackets, "
        f"weights read of FFNs.\n{'; '.join(notes)}.\n"
    )


def _records(name: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = load(f"quality-compensation-{name}")["records"]
    return records


def _weighting(records: Sequence[dict[str, Any]], method: str) -> str:
    weighting = next(r["weighting"] for r in records if r["method"] == method)
    return "" if weighting == "none" else f" × {weighting}"


def _cell(plain: dict[str, Any] | None, predicted: dict[str, Any] | None) -> str:
    if plain is None or predicted is None:
        return ""
    before, after = (r["perplexity"] / r["dense_perplexity"] - 1 for r in (plain, predicted))
    return f"{before:+.1%} → {after:+.1%} ({plain['weights_read']:.1%} → {predicted['weights_read']:.1%})"
