"""Fills the tables and counts of the docs from benchmarks/results/*.json, between markers:

    <!-- table: NAME -->
    <!-- /table -->

`python benchmarks/tables.py` rewrites them; with `--check` it fails if one is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import allocation_tables
import claims
import compensation_tables
import proxy_tables
import speed
from documents import load, row

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- (?:table|count): (\S+) -->\n?).*?(<!-- /(?:table|count) -->)", re.DOTALL)


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


def prompt(name: str) -> str:
    """Return perplexity and weights read behind dense prompts, a column for each sparsity."""
    document = load(name)
    records = document["records"]
    sparsities = sorted({r["sparsity"] for r in records})
    lines = [row(["method", "set", *(f"{s:.0%}" for s in sparsities)]), row(["---"] * 2 + ["---:"] * len(sparsities))]
    lines.append(row(["dense", "", f"{records[0]['dense_perplexity']:.2f}"]))
    for key in dict.fromkeys((r["method"], r["weighting"]) for r in records):
        found = {r["sparsity"]: r for r in records if (r["method"], r["weighting"]) == key}
        cells = [f"{found[s]['perplexity']:.2f} (reads {found[s]['weights_read']:.0%})" for s in sparsities]
        whose = "each sequence's" if found[sparsities[0]]["indicator"] == "given" else "each token's"
        lines.append(row([key[0] if key[1] == "none" else f"{key[0]} × {key[1]}", whose, *cells]))
    first = records[0]
    note = (
        f"\nPerplexity of the tokens behind a dense prompt of {first['prompt_tokens']} in each window of "
        f"{first['window_tokens']}, topk; in brackets, weights read of the FFNs.\n"
    )
    return "\n".join(lines) + "\n" + note + source(name, document)


def allocation(name: str) -> str:
    """Return perplexity and KL under each allocation, and what they change of the loss under uniform."""
    document = load(name)
    lines = [row(["method", "decision", "allocation", *(f"{s:.0%}" for s in (0.5, 0.7, 0.8))])]
    lines.append(row(["---"] * 3 + ["---:"] * 3))
    records = {(r["method"], r["decision"], r["allocation"], r["sparsity"]): r for r in document["records"]}
    for method, decision, spread in dict.fromkeys(key[:3] for key in records):
        cells = [
            _against(records[method, decision, spread, s], records[method, decision, "uniform", s])
            for s in (0.5, 0.7, 0.8)
        ]
        weighting = next(r["weighting"] for key, r in records.items() if key[0] == method)
        label = method if weighting == "none" else f"{method} × {weighting}"
        lines.append(row([label, decision, spread, *cells]))
    dense = document["records"][0]["dense_perplexity"]
    note = f"\nPerplexity (dense {dense:.2f}); in brackets, change of (perplexity − dense) and of KL against uniform.\n"
    return "\n".join(lines) + "\n" + note + source(name, document)


def _against(record: dict[str, Any], uniform: dict[str, Any]) -> str:
    shown = f"{record['perplexity']:.2f}"
    if record is uniform:
        return shown
    loss, base = (r["perplexity"] - r["dense_perplexity"] for r in (record, uniform))
    return f"{shown} ({loss / base - 1:+.0%}, {record['kl'] / uniform['kl'] - 1:+.0%})"


def proxy(name: str) -> str:
    """Return perplexity of proxies against the exact coefficient, and of methods that need none."""
    document = load(name)
    records = {(*_proxy_key(r), r["sparsity"]): r for r in document["records"]}
    sparsities = sorted({key[-1] for key in records})
    lines = [
        row(["method", "decision", *(f"{s:.0%}" for s in sparsities)]),
        row(["---"] * 2 + ["---:"] * len(sparsities)),
    ]
    for label, decision in dict.fromkeys(key[:2] for key in records):
        cells = []
        for sparsity in sparsities:
            found, exact = records[label, decision, sparsity], records["d-countdown", decision, sparsity]
            against = f"{found['perplexity'] / exact['perplexity'] - 1:+.1%}, " if label.startswith("d-proxy") else ""
            cells.append(f"{found['perplexity']:.2f} ({against}reads {found['weights_read']:.0%})")
        lines.append(row([label, decision, *cells]))
    first = document["records"][0]
    note = (
        f"\nPerplexity (dense {first['dense_perplexity']:.2f}, of the dithered copy); in brackets, against "
        "`d-countdown` under the same decision, and weights read.\n"
    )
    return "\n".join(lines) + "\n" + note + source(name, document)


def _proxy_key(record: dict[str, Any]) -> tuple[str, str]:
    label = record["method"] if record["weighting"] == "none" else f"{record['method']} × {record['weighting']}"
    return f"{label}, {record['bits']} bits" if "bits" in record else label, record["decision"]


def texts(name: str) -> str:
    """Return by how much realised sparsity misses its target on each text: over the model, and by layer."""
    document = load(name)
    records = document["records"]
    kinds = list(dict.fromkeys(r["text"] for r in records))
    lines = [row(["method", "sparsity", "calibrated on", *(kind.removesuffix(".txt") for kind in kinds)])]
    lines.append(row(["---", "---:", "---"] + ["---:"] * len(kinds)))
    keys = dict.fromkeys((r["method"], r["weighting"], r["sparsity"], tuple(r["calibrated_on"])) for r in records)
    for key in keys:
        found = {
            r["text"]: r
            for r in records
            if (r["method"], r["weighting"], r["sparsity"], tuple(r["calibrated_on"])) == key
        }
        label, seen = f"{key[0]} × {key[1]}", " + ".join(key[3])
        lines.append(row([label, f"{key[2]:.0%}", seen, *(_miss(found[kind]) for kind in kinds)]))
    note = "\nRealised minus target, in points: over the model (lowest layer to highest).\n"
    return "\n".join(lines) + "\n" + note + source(name, document)


def _miss(record: dict[str, Any]) -> str:
    pairs = zip(record["realised_sparsity_by_layer"], record["target_by_layer"], strict=True)
    layers = [100 * (realised - target) for realised, target in pairs]
    whole = 100 * (record["realised_sparsity"] - record["sparsity"])
    return f"{whole:+.1f} ({min(layers):+.1f} to {max(layers):+.1f})"


def tasks(name: str) -> str:
    """Return accuracies by method and sparsity, with the paired difference from dense and its interval."""
    document = load(name)
    records = [r for r in document["records"] if r["run"] == "sparse"]
    checks = {r["metric"]: r for r in document["records"] if r["run"] == "dense"}
    lines = [row(["method", "sparsity", "weights read", *checks]), row(["---"] + ["---:"] * (2 + len(checks)))]
    lines.append(row(["dense", "", "100%", *(f"{r['dense']:.1%}" for r in checks.values())]))
    for method, weighting, sparsity in dict.fromkeys((r["method"], r["weighting"], r["sparsity"]) for r in records):
        found = {
            r["metric"]: r
            for r in records
            if (r["method"], r["weighting"], r["sparsity"]) == (method, weighting, sparsity)
        }
        first = next(iter(found.values()))
        label = method if weighting == "none" else f"{method} × {weighting}"
        shares = [f"{sparsity:.0%} ({first['realised_sparsity']:.1%})", f"{first['weights_read']:.0%}"]
        lines.append(row([label, *shares, *(_against_dense(found[metric]) for metric in checks)]))
    note = "\nIn brackets: realised sparsity; difference from dense in points, and its 95% interval.\n"
    return "\n".join(lines) + "\n" + note + _tasks_source(name, document, checks)


def _against_dense(record: dict[str, Any]) -> str:
    points = [100 * record[key] for key in ("difference", "low", "high")]
    return "{:.1%} ({:+.1f}, {:+.1f} to {:+.1f})".format(record["sparse"], *points)


def _tasks_source(name: str, document: dict[str, Any], checks: dict[str, dict[str, Any]]) -> str:
    meta, records = document["meta"], document["records"]
    text = next(r for r in records if r["run"] == "perplexity")
    same = all(r["dense"] == r["lm_eval"] for r in checks.values())
    precise = ", ".join(f"{metric} {r['float32']:.1%}" for metric, r in checks.items())
    return (
        f"\nDense accuracies are {'exactly' if same else 'NOT'} those of lm-eval's own `HFLM`; with log-probabilities "
        f"in float32 they are {precise}. Perplexity of {text['text']}, {text['tokens']} scored tokens: "
        f"{text['dense_perplexity']:.2f} by `evaluate`, {text['lm_eval']:.2f} by lm-eval's rolling log-likelihood.\n"
        f"\n{records[0]['documents']} documents, {meta['batch_size']} in a call; {meta['hardware']['cpu']}, "
        f"{records[0]['dtype']}, torch {meta['versions']['torch']}, transformers {meta['versions']['transformers']}, "
        f"lm-eval {meta['lm_eval']}, commit {meta['commit'][:8]}; `benchmarks/results/{name}.json`.\n"
    )


def census(name: str) -> str:
    """Return how many classes are accepted, which, and which are refused for what reason."""
    document = load(name)
    records = document["records"]
    outcomes = {record["class"]: _outcome(record) for record in records}
    order = sorted(records, key=lambda r: (r["outcome"], not r["verified"], r["verified"] != "end to end"))
    mappings = ["causal-lm", "image-text-to-text", "multimodal-lm", ""]
    lines = [row(["", *(mapping or "all, each class once" for mapping in mappings)]), row(["---"] + ["---:"] * 4)]
    inside = [[r for r in records if mapping in r["mapping"]] for mapping in mappings]
    for outcome in dict.fromkeys(
        outcomes[r["class"]] for r in sorted(order, key=lambda r: r["outcome"] == "not built")
    ):
        lines.append(row([outcome, *(str(sum(outcomes[r["class"]] == outcome for r in some)) for some in inside)]))
    lines += [row(["classes", *(str(len(some)) for some in inside)]), "", "### Accepted", ""]
    lines += [row(["class", "FFN", "activation", "gate and up", "verified"]), row(["---"] * 5)]
    for r in records:
        if r["outcome"] == "accepted":
            form = "fused" if r["fused"] else "split"
            verified = r["verified"] or f"no: {r['reason']}"
            lines.append(row([f"`{r['class']}`", f"`{r['ffn']}`", r["activation"], form, verified]))
    lines += ["", "### Refused"]
    for category in dict.fromkeys(r["category"] for r in records if r["outcome"] == "refused"):
        names = [f"`{r['class']}`" for r in records if r["category"] == category]
        lines += ["", f"{category} ({len(names)}): {', '.join(names)}."]
    lines += ["", "### Not built", ""]
    lines += [f"- `{r['class']}`: {r['reason'].partition('. ')[0]}" for r in records if r["outcome"] == "not built"]
    meta = document["meta"]
    note = f"torch {meta['versions']['torch']}, transformers {meta['versions']['transformers']}"
    return "\n".join(lines) + f"\n\n{note}, commit {meta['commit'][:8]}; `benchmarks/results/{name}.json`.\n"


def accepted(name: str) -> str:
    """Return how many classes are accepted and verified, of how many, and the same for causal language models alone."""
    records = load(name)["records"]
    causal = [record for record in records if "causal-lm" in record["mapping"]]
    whole, some = (f"{sum(bool(r['verified']) for r in group)} of {len(group)}" for group in (records, causal))
    return f"{whole} (of the causal language models alone {some})"


def _outcome(record: dict[str, Any]) -> str:
    if record["outcome"] == "accepted":
        return f"accepted, verified {record['verified']}" if record["verified"] else "accepted, not verified"
    return f"{record['outcome']}: {record['category']}" if record["category"] else record["outcome"]


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


TABLES: dict[str, Callable[[], str]] = {
    "quality-smollm2": lambda: quality("quality-smollm2"),
    "quality-gemma3": lambda: quality("quality-gemma3"),
    "quality-teal-smollm2": lambda: quality("quality-teal-smollm2"),
    "quality-teal-gemma3": lambda: quality("quality-teal-gemma3"),
    "quality-prompt-smollm2": lambda: prompt("quality-prompt-smollm2"),
    "allocation-smollm2": lambda: allocation("allocation-smollm2"),
    "allocation-gemma3": lambda: allocation("allocation-gemma3"),
    "linears-quality": lambda: allocation_tables.linears("linears"),
    "attention-quality": lambda: allocation_tables.linears("attention"),
    "budget-quality": allocation_tables.budget,
    "alpha-search-smollm2": lambda: allocation_tables.alpha_search("alpha-search-smollm2"),
    "texts-smollm2": lambda: texts("texts-smollm2"),
    "texts-gemma3": lambda: texts("texts-gemma3"),
    "gpu-ffn": lambda: speed.ffn("gpu-ffn-h200", "quality-proxy-gemma3"),
    "gpu-ffn-h100": lambda: speed.ffn("gpu-ffn-h100"),
    "gpu-headline": lambda: speed.headline("gpu-ffn-h200", "gpu-decode-h200", "quality-proxy-gemma3"),
    "gpu-launches": lambda: speed.launches("gpu-ffn-h200"),
    "gpu-second-card": lambda: speed.second_card("gpu-ffn-h200-second-card"),
    "cpu-versus": lambda: speed.versus(
        ["cpu-decode-1.5b", "cpu-decode-1.5b-1-thread", "cpu-decode", "cpu-decode-1-thread"]
    ),
    "calibration-time": lambda: speed.calibration("calibration-time-smollm2"),
    "readme-commands": lambda: speed.commands("readme-commands-smollm2"),
    "gpu-shapes": lambda: speed.shapes("gpu-ffn-shapes-h200"),
    "gpu-tokens": lambda: speed.tokens("gpu-ffn-tokens-h200"),
    "gpu-decode": lambda: speed.decode("gpu-decode-h200"),
    "compensation": lambda: compensation_tables.rises(["smollm2", "gemma3", "qwen2.5"]),
    "compensation-shrinkage": lambda: compensation_tables.shrinkage("quality-shrinkage-smollm2"),
    "compensation-residuals": lambda: compensation_tables.residuals("residuals-smollm2"),
    "compensation-harm": lambda: compensation_tables.harm("compensation-harm-smollm2"),
    "compensation-time": lambda: speed.predicting(["cpu-ffn-affine", "cpu-ffn-affine-1-thread"]),
    "compensation-time-gpu": lambda: speed.predicting(["gpu-ffn-looks-h200"]),
    "second-look-time": lambda: speed.looking(["gpu-ffn-looks-h200", "cpu-ffn-looks", "cpu-ffn-looks-1-thread"]),
    "together": lambda: speed.together("together-smollm2"),
    "contexts": lambda: speed.contexts(["contexts-cpu-1.5b", "contexts-h200", "contexts-d-proxy-h200"]),
    "gpu-together": lambda: speed.together("together-h200"),
    "gpu-engine": lambda: speed.engine(["engine-h200"]),
    "gpu-decode-h100": lambda: speed.decode("gpu-decode-h100"),
    "gpu-decode-linears": lambda: speed.decode("gpu-decode-linears-h200"),
    "gpu-decode-combined": lambda: speed.decode("gpu-decode-combined-h200"),
    "linears": lambda: speed.linears("linears-h200"),
    "cpu-linears": lambda: speed.linears("cpu-linears"),
    "cpu-ffn": lambda: speed.cpu_ffn("cpu-ffn"),
    "cpu-ffn-1-thread": lambda: speed.cpu_ffn("cpu-ffn-1-thread"),
    "cpu-decode": lambda: speed.decode("cpu-decode"),
    "cpu-decode-1-thread": lambda: speed.decode("cpu-decode-1-thread"),
    "cpu-decode-1.5b": lambda: speed.decode("cpu-decode-1.5b"),
    "cpu-decode-1.5b-1-thread": lambda: speed.decode("cpu-decode-1.5b-1-thread"),
    "cpu-decode-1.5b-linears": lambda: speed.decode("cpu-decode-1.5b-linears"),
    "cpu-random-rows": lambda: speed.random_rows("cpu-random-rows"),
    "cases": speed.cases,
    "serving": lambda: speed.serving("serving-smollm2", "serving-soak-smollm2"),
    "passes": lambda: speed.passes(("passes-h200", "passes-cpu-smollm2")),
    "busy-cores": lambda: speed.busy_cores("busy-cores-smollm2"),
    "quality-proxy-smollm2": lambda: proxy("quality-proxy-smollm2"),
    "quality-proxy-gemma3": lambda: proxy("quality-proxy-gemma3"),
    "quantisers": lambda: proxy_tables.quantisers("quantisers-smollm2"),
    "shipped": lambda: proxy_tables.shipped("quality-proxy-shipped-smollm2"),
    "survivors": lambda: proxy_tables.survivors(("smollm2", "gemma3")),
    "tasks-smollm2": lambda: tasks("tasks-smollm2"),
    "claims-quality": lambda: claims.quality(
        {
            "SmolLM2-135M": ["claims-smollm2", "claims-piqa-smollm2", "quality-linears-smollm2", "tasks-smollm2"],
            "Gemma-3-270M": ["claims-gemma3"],
            "Qwen2.5-Coder-0.5B": ["claims-qwen2.5"],
        }
    ),
    "claims-speed": claims.speed,
    "census": lambda: census("census"),
    "accepted": lambda: accepted("census"),
    "summary-smollm2": lambda: summary("quality-smollm2"),
}

if __name__ == "__main__":
    main()
