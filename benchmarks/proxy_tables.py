"""Tables about proxies, for `tables.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from documents import load, table

MODELS = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma-3-270M"}


def quantisers(name: str) -> str:
    """Return what each way to quantise loses, fewest bits first."""
    document = load(name)
    records = {(*_form(r), r["sparsity"]): r for r in document["records"]}
    sparsities = sorted({key[-1] for key in records})
    forms = sorted({key[:-1] for key in records}, key=lambda key: (-key[0], records[*key, 0.7]["bits_per_weight"], key))
    rows = []
    for form in forms:
        found = [records[*form, sparsity] for sparsity in sparsities]
        bits, group, levels, search = form
        kept = form == (4, 64, "half-step", "importance")
        cells = [f"{r['lost']:.2%}" for r in found]
        searched = {"none": "", "plain": "searched", "importance": "searched by E[x²]"}[search]
        label = [f"{bits}", f"{group}", levels, searched, f"{found[0]['bits_per_weight']:.2f}"]
        rows.append([f"**{cell}**" if kept and cell else cell for cell in (*label, *cells)])
    head = ["bits", "group", "levels", "scale", "bits a weight", *(f"{s:.0%}" for s in sparsities)]
    meta, first = document["meta"], document["records"][0]
    note = (
        f"\nLost Σ s² by sparsity; bold is what `d-proxy` uses. {first['model']}, dithered, every third layer, "
        f"{first['tokens']} tokens of WikiText-2's validation split, commit {meta['commit'][:8]}; "
        f"`benchmarks/results/{name}.json`.\n"
    )
    return table(head, rows, left=4) + note


def _form(record: dict[str, Any]) -> tuple[int, int, str, str]:
    return record["bits"], record["group"], record["levels"], record["search"]


def survivors(names: Sequence[str]) -> str:
    """Return perplexity with exact survivors, and with the proxy's own coefficients."""
    rows = []
    for name in names:
        records = load(f"quality-survivors-{name}")["records"]
        found = {(r["bits"], r["sparsity"], r["survivors"]): r["perplexity"] for r in records}
        sparsities = sorted({key[1] for key in found})
        rows.append([MODELS[name], "", f"dense {records[0]['dense_perplexity']:.2f}", *[""] * (len(sparsities) - 1)])
        for bits in sorted({key[0] for key in found}, reverse=True):
            exact = [found[bits, s, "exact"] for s in sparsities]
            taken = [found[bits, s, "proxy"] for s in sparsities]
            rows.append(["", f"{bits} bits, exact", *(f"{value:.2f}" for value in exact)])
            changes = [f"{p:.2f} ({p / e - 1:+.1%})" for e, p in zip(exact, taken, strict=True)]
            rows.append(["", f"{bits} bits, the proxy's", *changes])
    head = ["", "coefficients", *(f"{s:.0%}" for s in sparsities)]
    return (
        table(head, rows, left=2)
        + "\nPerplexity, topk, dithered copies; in brackets, against exact survivors.\n"
        + _from([f"quality-survivors-{name}" for name in names])
    )


def shipped(name: str) -> str:
    """Return perplexity of the exact coefficient and of the proxy, on weights as a GGUF file has them."""
    document = load(name)
    found = {(r["decision"], r["method"], r["sparsity"]): r for r in document["records"]}
    sparsities = sorted({key[2] for key in found})
    rows = []
    for decision in ("topk", "threshold"):
        for method in ("d-countdown", "d-proxy"):
            cells = []
            for sparsity in sparsities:
                value = found[decision, method, sparsity]["perplexity"]
                exact = found[decision, "d-countdown", sparsity]["perplexity"]
                cells.append(f"{value:.2f}" + ("" if method == "d-countdown" else f" ({value / exact - 1:+.1%})"))
            rows.append([decision, f"`{method}`", *cells])
    meta, first = document["meta"], document["records"][0]
    note = (
        f"\nPerplexity, as shipped; in brackets, against the exact coefficient. {first['model']}, dense "
        f"{first['dense_perplexity']:.2f}, WikiText-2, {first['windows']} windows, {meta['hardware']['gpu']}, commit "
        f"{meta['commit'][:8]}; `benchmarks/results/{name}.json`.\n"
    )
    return table(["decision", "method", *(f"{s:.0%}" for s in sparsities)], rows, left=2) + note


def _from(names: Sequence[str]) -> str:
    documents = [load(name) for name in names]
    parts = [
        f"{d['records'][0]['windows']} windows, commit {d['meta']['commit'][:8]}, `benchmarks/results/{name}.json`"
        for name, d in zip(names, documents, strict=True)
    ]
    meta = documents[0]["meta"]
    return f"WikiText-2; {'; '.join(parts)}; {meta['hardware']['cpu']}, torch {meta['versions']['torch']}.\n"
