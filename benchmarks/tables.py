"""Fills the tables of the docs from benchmarks/results/*.json, between markers:

    <!-- table: NAME -->
    <!-- /table -->

`python benchmarks/tables.py` rewrites them; with `--check` it fails if one is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def main() -> None:
    """Rewrite the pages, or with --check compare them."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = MARKED.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)
        if filled != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(filled, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"tables out of date in {', '.join(stale)}: run make docs")


def load(name: str) -> dict[str, Any]:
    """Return a results file."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def source(name: str, document: dict[str, Any]) -> str:
    """Return the line under a table that says where its numbers come from."""
    meta = document["meta"]
    hardware = meta["hardware"].get("gpu") or meta["hardware"]["cpu"]
    first = document["records"][0]
    return (
        f"\n{first['windows']} windows, {first['tokens']} scored tokens; {hardware}, {first['dtype']}, "
        f"torch {meta['versions']['torch']}, transformers {meta['versions']['transformers']}, "
        f"commit {meta['commit'][:8]}; `benchmarks/results/{name}.json`.\n"
    )


def quality(name: str) -> str:
    """Return perplexity by method, weighting and decision, a column for each sparsity."""
    document = load(name)
    records = document["records"]
    sparsities = sorted({r["sparsity"] for r in records})
    head = ["method", "weighting", "decision", *(f"{s:.0%}" for s in sparsities)]
    dense = records[0]["dense_perplexity"]
    lines = [row(head), row(["---"] * 3 + ["---:"] * len(sparsities)), row(["dense", "", "", f"{dense:.2f}"])]
    for key in dict.fromkeys((r["method"], r["weighting"], r["decision"]) for r in records):
        found = {r["sparsity"]: r for r in records if (r["method"], r["weighting"], r["decision"]) == key}
        lines.append(row([*key, *(cell(found[s]) for s in sparsities)]))
    note = "\nPerplexity; for thresholds, the realised sparsity in brackets.\n"
    return "\n".join(lines) + "\n" + note + source(name, document)


def summary(name: str) -> str:
    """Return the README's short table: thresholds that run fast, and the ideal beside them."""
    document = load(name)
    wanted = [
        ("m-countdown", "none"),
        ("m-countdown", "rms"),
        ("cats", "none"),
        ("cats", "rms"),
        ("d-countdown", "none"),
    ]
    lines = [row(["method", "weights read at 70%", "50%", "60%", "70%"]), row(["---", "---:", "---:", "---:", "---:"])]
    lines.append(row(["dense", "100%", f"{document['records'][0]['dense_perplexity']:.1f}", "", ""]))
    for method, weighting in wanted:
        decision = "topk" if method == "d-countdown" else "threshold"
        found = {
            r["sparsity"]: r
            for r in document["records"]
            if (r["method"], r["weighting"], r["decision"]) == (method, weighting, decision)
        }
        label = method if weighting == "none" else f"{method}, weighting {weighting}"
        label += " (bound)" if decision == "topk" else ""
        perplexities = [f"{found[s]['perplexity']:.1f}" for s in (0.5, 0.6, 0.7)]
        lines.append(row([label, f"{found[0.7]['weights_read']:.0%}", *perplexities]))
    return "\n".join(lines) + "\n" + source(name, document)


def cell(record: dict[str, Any]) -> str:
    """Return perplexity, and for a threshold the sparsity it realised."""
    value = record["perplexity"]
    shown = f"{value:.2f}" if value < 1000 else f"{value:.0f}"
    return shown if record["decision"] == "topk" else f"{shown} ({100 * record['realised_sparsity']:.1f}%)"


def row(cells: list[str]) -> str:
    """Return a Markdown table row."""
    return "| " + " | ".join(cells) + " |"


TABLES: dict[str, Callable[[], str]] = {
    "quality-smollm2": lambda: quality("quality-smollm2"),
    "quality-gemma3": lambda: quality("quality-gemma3"),
    "summary-smollm2": lambda: summary("quality-smollm2"),
}

if __name__ == "__main__":
    main()
