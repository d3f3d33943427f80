"""What commands print: numbers to stdout, everything else to stderr."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from countdown.errors import ProfileWarning

if TYPE_CHECKING:
    from torch import nn

    from countdown.comparison.comparison import Cell, Comparison
    from countdown.evaluation.continuations import Continuations
    from countdown.evaluation.evaluate import Evaluation
    from countdown.evaluation.generation import Generation
    from countdown.integrations.lm_eval import TaskEvaluation
    from countdown.profiles.recipe import Recipe

err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line to stderr as it is."""
    err.print(line, markup=False)


def emit(target: str | None, document: Any) -> None:
    from countdown.results import write

    if target is not None:
        write(target, document)


def table_console(json: str | None) -> Console:
    """Return where tables go: stdout, unless JSON does."""
    return err if json == "-" else _stdout()


def _stdout() -> Console:
    # A table wider than the terminal wraps there; rich would cut its cells instead, and at 80 in a pipe.
    return Console(highlight=False, width=max(150, shutil.get_terminal_size().columns))


def print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def evaluation_cells(result: Evaluation) -> tuple[str, ...]:
    return (
        f"{result.realised_sparsity:.1%}",
        f"{result.weights_read:.0%}",
        f"{result.perplexity:.2f}",
        f"{result.kl:.3f}",
        f"{result.top1:.1%}",
    )


def print_evaluation(out: Console, recipe: Recipe, result: Evaluation, text: str) -> None:
    entries = recipe.lines()
    header = ["", "realised", "weights read", "perplexity", "KL", "same top token"]
    dense = ("dense", "", "100%", f"{result.dense_perplexity:.2f}", "", "")
    print_table(
        out, header, [dense, (escape(entries[0]) if len(entries) == 1 else "sparse", *evaluation_cells(result))]
    )
    for entry in entries if len(entries) > 1 else []:
        out.print(entry, markup=False)
    layers = [layer.realised for layer in result.layers]
    dense_prompts = result.protocol == "decode" or result.prompt_tokens is not None
    every = "dense prompts, every scored token sparse" if dense_prompts else "every token sparse"
    out.print(
        f"{result.tokens} scored tokens of {text}, {every}; "
        f"realised sparsity of the modules {min(layers):.1%} to {max(layers):.1%}",
        markup=False,
    )


def print_tasks(out: Console, recipe: Recipe, result: TaskEvaluation) -> None:
    """Print a row for each task and metric: dense, sparse, and the difference with its interval."""
    header = ["task", "metric", "documents", "dense", "sparse", "difference", "95% interval"]
    rows = []
    for score in result.scores:
        values = (f"{score.dense:.4f}", f"{score.sparse:.4f}", f"{score.difference:+.4f}")
        rows.append((score.task, score.name, str(score.documents), *values, _interval(score.low, score.high, "+.4f")))
    print_table(out, header, rows)
    _print_about(out, recipe, result)
    sparse = "every token" if result.protocol == "all" else "every generated token"
    out.print(
        f"{sparse} sparse: {result.tokens} tokens fed to every module\n"
        "intervals: Student's t over the differences by document"
    )


def print_continuations(out: Console, recipe: Recipe, result: Continuations) -> None:
    """Print the means, and how the two texts of each prompt compare."""
    rows = []
    for one in result.continuations:
        parted = "same" if one.first_divergence is None else str(one.first_divergence)
        prompt = one.prompt if len(one.prompt) <= 40 else f"{one.prompt[:39]}…"
        perplexities = (f"{one.dense_perplexity:.2f}", f"{one.perplexity:.2f}")
        rows.append((escape(prompt), str(one.tokens), parted, f"{one.edit_distance:.0%}", *perplexities))
    header = ["prompt", "tokens", "parts at", "edit distance", "perplexity: dense", "sparse"]
    print_table(out, header, rows)
    means = {
        "tokens before they part": (result.shared_tokens, ".1f"),
        "edit distance": (result.edit_distance, ".1%"),
        "perplexity of the dense text": (result.dense_perplexity, ".2f"),
        "perplexity of the sparse text": (result.perplexity, ".2f"),
        "ratio of the two": (result.perplexity_ratio, ".2f"),
    }
    out.print()
    cells = [(name, f"{one.mean:{form}}", _interval(one.low, one.high, form)) for name, (one, form) in means.items()]
    print_table(out, [f"means of {len(rows)} prompts", "", "95% interval"], cells)
    _print_about(out, recipe, result)
    out.print(
        f"{result.identical:.0%} of the prompts have the same text; perplexities are the dense model's\n"
        "means of perplexities are geometric; intervals: Student's t over prompts"
    )


def _print_about(out: Console, recipe: Recipe, result: TaskEvaluation | Continuations) -> None:
    for entry in recipe.lines():
        out.print(entry, markup=False)
    out.print(f"realised sparsity {result.realised_sparsity:.1%}, weights read {result.weights_read:.0%}")


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _parting(dense: Generation, sparse: Generation) -> str:
    from countdown.evaluation.generation import first_difference

    parted = first_difference(dense.tokens, sparse.tokens)
    if parted is None:
        return "The tokens are the same"
    return f"The tokens part after {parted}" if parted else "The tokens differ from the first on"


def print_speeds(runs: dict[str, Generation], model: nn.Module) -> None:
    from countdown.modules import sparse_modules
    from countdown.sparsify import realised_sparsity, status

    for name, run in runs.items():
        if run.tokens_per_s:
            err.print(f"{name}: {len(run.tokens)} tokens, {run.tokens_per_s:.1f} tokens/s")
    if len(runs) == 2:
        err.print(_parting(runs["dense"], runs["sparse"]))
    if sparse_modules(model):
        mean, sites = realised_sparsity(model), status(model)
        if mean is not None:
            kept = sum(site.beside_bytes for site in sites)
            beside = f", {kept / 1e6:.0f} MB beside the weights" if kept else ""
            computed_by = ", ".join(dict.fromkeys(site.backend for site in sites))
            err.print(f"realised sparsity {mean:.1%}, backend {computed_by}{beside}")


def print_ffn_speeds(out: Console, records: Sequence[dict[str, Any]]) -> None:
    """Print a row for each configuration; of one that computes wrong, its error and no time."""
    header = ["d × h", "tokens", "method", "sparsity", "realised", "µs", "dense µs", "× dense", "floor µs", "of floor"]
    rows = []
    for r in records:
        method = f"{r['method']} + {r['compensate']}" if r["compensate"] else r["method"]
        method = f"{method}, second look {r['second_look']:g}" if r["second_look"] else method
        what = (f"{r['d']} × {r['h']}", str(r["tokens"]), method, f"{r['sparsity']:.0%}")
        if "time_us" not in r:
            rows.append((*what, "WRONG", f"error {r['error']:.1e}", "", "", "", ""))
            continue
        times = (f"{r['time_us']:.1f}", f"{r['dense_time_us']:.1f}", f"{r['speedup']:.2f}")
        rows.append((*what, f"{r['realised_sparsity']:.1%}", *times, f"{r['floor_us']:.1f}", f"{r['floor_share']:.0%}"))
    print_table(out, header, rows)
    dense = ", ".join(dict.fromkeys(r["dense_variant"] for r in records))
    out.print(f"bandwidth {records[0]['bandwidth'] / 1e12:.3f} TB/s; dense: {dense}")


def print_decode_speeds(out: Console, records: Sequence[dict[str, Any]]) -> None:
    """Print tokens/s of each run, and where a token's time goes."""
    header = ["", *SPEED_HEADER, "of floor", "FFN µs", "attention's linears", "head", "rest", "prefill ms"]
    rows = []
    for r in records:
        name, *more = _decode_row(r)
        rows.append((name, *more, *[""] * (len(header) - 1 - len(more))))
    print_table(out, header, rows)
    for r in records:
        if "unreliable" in r:
            out.print(f"{_run_name(r)}: its speed-up is unreliable: {r['unreliable']}", markup=False)
        if r["run"] == "sparse":
            out.print(f"{r['method']}: realised sparsity {r['realised_sparsity']:.1%}, backend {r['backend']}")


def _run_name(record: dict[str, Any]) -> str:
    if record["run"] == "generate":
        return "Hugging Face generate"
    return f"{record['run']} {record['format']}" if "format" in record else str(record.get("method", record["run"]))


def _decode_row(r: dict[str, Any]) -> tuple[str, ...]:
    name = _run_name(r)
    if "speedup" not in r:
        return (name, f"{r['tokens_per_s']:.1f}")
    ends = None if r["run"] == "dense" else (r["speedup_low"], r["speedup_high"])
    speeds = speed_cells(r["tokens_per_s"], r["dense_tokens_per_s"], r["speedup"], ends, "unreliable" not in r)
    if "split_us" not in r:
        return (name, *speeds)
    # What is not known is empty: of single linears that are sparse, and where other work came between.
    split = r["split_us"]
    parts = [f"{split[part]:.0f}" if split else "" for part in ("ffn", "attention_linears", "head", "rest")]
    return (name, *speeds, f"{r['floor_share']:.0%}", *parts, f"{r['prefill_ms']:.1f}")


SPEED_HEADER = ["tokens/s", "dense beside", "× dense", "95%"]


def speed_cells(
    rate: float, dense: float | None, speedup: float, ends: tuple[float, float] | None, reliable: bool
) -> tuple[str, ...]:
    """Return what stands below `SPEED_HEADER`; no interval where `ends` is None, as of the dense model itself."""
    beside = "" if dense is None else f"{dense:.1f}"
    interval = "" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
    return (f"{rate:.1f}", beside, f"{speedup:.2f}" if reliable else "unreliable", interval)


def print_comparison(out: Console, found: Comparison) -> None:
    """Print a row for each configuration, what failed, what must be said beside, and what to take."""
    header = ["", "read", "perplexity", "loss", "95%", "KL", "same top", *SPEED_HEADER]
    print_table(out, header, [_comparison_row(cell) for cell in found.cells])
    for cell in found.cells:
        if cell.error:
            out.print(f"{cell.label} failed: {cell.error}", markup=False)
    meta = found.meta
    out.print(
        f"{meta['windows']} windows of {meta['window_tokens']} tokens of {meta['text']['source']}, every token "
        "sparse; loss is the rise of perplexity over dense; read: share of a whole token's weight bytes; "
        "same top: tokens both put first; dense beside: the dense model in the same rounds",
        markup=False,
    )
    _print_task_tables(out, found)
    for caveat in meta["caveats"]:
        out.print(caveat, markup=False)
    advice, rough = found.recommendation, " roughly" if found.rough else ""
    if advice is None:
        out.print("Recommended: nothing.", style="bold")
        return
    out.print(f"Recommended{rough}: {advice.label}", markup=False, style="bold")
    out.print(advice.reason, markup=False)
    if advice.confirmed_loss is not None:
        low, high = advice.interval
        verdict = "as expected" if advice.confirmed else "not as expected; measure on more --windows"
        out.print(
            f"On other windows it costs {advice.confirmed_loss:+.1%}, {verdict} "
            f"({low:+.1%} to {high:+.1%} for the best of so many)."
        )


def _print_task_tables(out: Console, found: Comparison) -> None:
    from countdown.comparison.task_tables import NOTE, task_tables

    for table in task_tables(found):
        out.print(f"\n{table.title}", markup=False, style="bold")
        print_table(out, ["", *table.header[1:]], [[escape(cell) for cell in row] for row in table.rows])
    if found.metrics():
        out.print(f"{NOTE}\n", markup=False)


def say_cell(cell: Cell) -> None:
    """Print in a line, to stderr, what was found of a configuration."""
    parts = []
    if cell.quality is not None:
        loss = "" if cell.kind == "dense" else f" ({cell.quality.loss:+.1%})"
        parts.append(f"perplexity {cell.quality.perplexity:.2f}{loss}")
    if cell.speed is not None:
        parts.append(f"{cell.speed.tokens_per_s:.1f} tokens/s")
        if cell.kind != "dense":
            parts.append(f"{cell.speed.speedup:.2f} × dense" if cell.doubt is None else "speed-up unreliable")
    parts += [f"{one.task} {one.metric} {one.value:.4f}" for one in cell.tasks]
    if cell.error:
        parts.append(f"failed: {cell.error}")
    say(f"{cell.label}: {', '.join(parts)}")


def _comparison_row(cell: Cell) -> tuple[str, ...]:
    read = "" if cell.weights_read is None else f"{cell.weights_read:.0%}"
    quality, speeds = ("",) * 5, ("",) * len(SPEED_HEADER)
    if cell.quality is not None:
        low, high = cell.quality.loss_interval
        interval = "" if cell.kind == "dense" else f"{low:+.1%} to {high:+.1%}"
        loss = "" if cell.kind == "dense" else f"{cell.quality.loss:+.1%}"
        numbers = (f"{cell.quality.perplexity:.2f}", loss, interval)
        quality = (*numbers, f"{cell.quality.kl:.3f}", f"{cell.quality.top1:.1%}")
    if cell.speed is not None:
        speed = cell.speed
        ends = None if cell.kind == "dense" else speed.interval
        speeds = speed_cells(speed.tokens_per_s, speed.dense_beside, speed.speedup, ends, cell.doubt is None)
    return (escape(cell.label), read, *quality, *speeds)


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, ProfileWarning):
        err.print(f"warning: {message}", markup=False)
