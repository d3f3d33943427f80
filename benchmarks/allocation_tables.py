"""Tables of how one sparsity is divided: among linears, among FFNs and attention on one budget, and by R-Sparse's α."""

from __future__ import annotations

from typing import Any

from documents import load, row

MODELS = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma-3-270M", "qwen2.5": "Qwen2.5-Coder-0.5B"}
ALLOCATIONS = ("uniform", "greedy", "global")
ATTENTION = "*.self_attn.*"


def linears(sweep: str) -> str:
    """Return perplexity and KL on all models of teal and wina under each allocation, r-sparse and, on all, chess.

    Args:
        sweep: linears or attention: all of them, or those of attention alone.
    """
    lines: list[str] = []
    sources: list[str] = []
    for model, label in MODELS.items():
        names = [f"quality-{sweep}-{model}", f"quality-low-rank-{model}"]
        names += [f"quality-chess-{model}"] if sweep == "linears" else []
        records = [record for name in names for record in load(name)["records"] if _is_of(record, sweep)]
        sparsities = sorted({_sparsity(record) for record in records})
        if not lines:
            lines = [row(["model", "method", "allocation", *(f"{s:.0%}" for s in sparsities)])]
            lines.append(row(["---"] * 3 + ["---:"] * len(sparsities)))
        dense = records[0]["dense_perplexity"]
        for method, allocation in sorted({_arm(record) for record in records}, key=_order):
            found = {_sparsity(r): r for r in records if _arm(r) == (method, allocation)}
            cells = (f"{found[s]['perplexity']:.2f} ({found[s]['kl']:.3f})" for s in sparsities)
            lines.append(row([f"{label} ({dense:.2f})", method, allocation, *cells]))
        sources += names
    note = "Perplexity (behind a model's name, that of the dense one); in brackets, KL."
    return "\n".join(lines) + f"\n\n{note}\n" + _sources(sources)


def _is_of(record: dict[str, Any], sweep: str) -> bool:
    """Whether a record is of these linears; with α = 1, r-sparse is teal."""
    if "recipe" in record:
        return True
    return (record.get("pattern") == ATTENTION) == (sweep == "attention") and record.get("alpha") != 1


def _arm(record: dict[str, Any]) -> tuple[str, str]:
    """Which row of a table a record is in: method and allocation."""
    if "recipe" in record:
        return "chess", "uniform"
    if "alpha" in record:
        return f"r-sparse, α {record['alpha']:g}", record["allocation"]
    return {"none": "teal", "shared-norm": "wina"}[record["weighting"]], record["allocation"]


def _sparsity(record: dict[str, Any]) -> float:
    return float(record["recipe"][0]["sparsity"] if "recipe" in record else record["sparsity"])


def _order(arm: tuple[str, str]) -> tuple[int, float, int]:
    kinds = ("teal", "wina", "r-sparse", "chess")
    name, _, alpha = arm[0].partition(", α ")
    return kinds.index(name), -float(alpha or 0), ALLOCATIONS.index(arm[1])


def budget() -> str:
    """Return perplexity and KL of one method, and of it with another on one budget, at equal bytes of a token."""
    lines: list[str] = []
    names = [f"quality-budget-{model}" for model in MODELS]
    for name, label in zip(names, MODELS.values(), strict=True):
        records = load(name)["records"]
        points = sorted({r["bytes_of_ffn_sparsity"] for r in records})
        if not lines:
            lines = [row(["model", "recipe", "allocation", *(f"bytes of FFNs at {s:.0%}" for s in points)])]
            lines.append(row(["---"] * 3 + ["---:"] * len(points)))
        dense = records[0]["dense_perplexity"]
        for recipe, allocation in dict.fromkeys((r["recipe_name"], r["allocation"]) for r in records):
            arm = [r for r in records if (r["recipe_name"], r["allocation"]) == (recipe, allocation)]
            found = {r["bytes_of_ffn_sparsity"]: r for r in arm}
            at = (found[s] for s in points)
            cells = (f"{r['perplexity']:.2f} ({r['kl']:.3f}), reads {r['token_read']:.1%}" for r in at)
            lines.append(row([f"{label} ({dense:.2f})", recipe, allocation, *cells]))
    note = (
        "Perplexity (behind a model's name, that of the dense one); in brackets, KL; the share of a whole token's "
        "weight bytes that was read."
    )
    return "\n".join(lines) + f"\n\n{note}\n" + _sources(names)


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
    return "\n".join(lines) + f"\n\n{note}\n" + _sources([name])


def _sources(names: list[str]) -> str:
    """Return where figures come from: once what is the same for all files, then their names."""
    about = dict.fromkeys(_about(load(name)) for name in names)
    files = ", ".join(f"`benchmarks/results/{name}.json`" for name in names)
    return f"\n{'; '.join(about)}; {files}.\n"


def _about(document: dict[str, Any]) -> str:
    meta, first = document["meta"], document["records"][0]
    hardware = meta["hardware"].get("gpu") or meta["hardware"]["cpu"]
    versions = f"torch {meta['versions']['torch']}, transformers {meta['versions']['transformers']}"
    return (
        f"{first['windows']} windows, {first['tokens']} scored tokens, calibrated on {meta['tokens']}; {hardware}, "
        f"{first['dtype']}, {versions}, commit {meta['commit'][:8]}"
    )
