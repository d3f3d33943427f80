"""Tables of speed, for `tables.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from countdown.methods import SECOND_LOOK
from documents import load, table

FUSED = "cuBLAS, gate and up fused"
METHODS = ("given", "m-countdown", "cats", "d-proxy")
# Where a method's quality is looked up: weighting and bits.
QUALITY = {"m-countdown": ("rms", None), "cats": ("rms", None), "d-proxy": ("none", 4)}


def ffn(name: str, quality: str | None = None) -> str:
    """Return µs, × cuBLAS and the floor by method and sparsity, and the perplexity beside, where it is known."""
    document = load(name)
    records = {(r["method"], r["sparsity"]): r for r in document["records"]}
    sparsities = sorted({key[1] for key in records if key[1] < 1})
    perplexities = _perplexities(quality) if quality else {}
    first = document["records"][0]
    rows = []
    if quality:
        dense = load(quality)["records"][0]["dense_perplexity"]
        rows.append(["dense", "perplexity", f"{dense:.1f}", *[""] * (len(sparsities) - 1)])
    for method in METHODS:
        found = [records[method, sparsity] for sparsity in sparsities]
        rows.append([f"`{method}`", "µs", *(f"{r['time_us']:.1f}" for r in found)])
        rows.append(["", "× dense", *(f"**{r['speedup_to_fused_cublas']:.2f}**" for r in found)])
        rows.append(["", "floor, ×", *(f"{first['dense_times_us'][FUSED] / r['floor_us']:.2f}" for r in found)])
        known = [perplexities.get((method, sparsity)) for sparsity in sparsities]
        if any(known):
            rows.append(["", "perplexity", *("" if found is None else f"{found:.1f}" for found in known)])
    variants = ", ".join(f"{label} {us:.1f} µs" for label, us in first["dense_times_us"].items())
    alone = {method: records[method, 1.0]["time_us"] for method in METHODS}
    note = (
        f"\n{_shape(first)}, one token. Dense: {variants}; × is against cuBLAS with gate and up fused. Deciding "
        f"alone, nothing active: `m-countdown` {alone['m-countdown']:.1f} µs, `d-proxy` {alone['d-proxy']:.1f} µs; an "
        f"empty given set {alone['given']:.1f} µs."
    )
    if quality:
        note += (
            " Perplexity: what that sparsity costs a small model, Gemma-3-270M dithered, weighting rms for "
            f"`m-countdown` and `cats` (`benchmarks/results/{quality}.json`)."
        )
    return table(["", "", *(f"{s:.0%}" for s in sparsities)], rows, left=2) + note + "\n" + _source(name, document)


def _perplexities(quality: str) -> dict[tuple[str, float], float]:
    return {
        (r["method"], r["sparsity"]): r["perplexity"]
        for r in load(quality)["records"]
        if QUALITY.get(r["method"]) == (r["weighting"], r.get("bits")) and r["decision"] == "threshold"
    }


def cpu_ffn(name: str) -> str:
    """Return ms, × torch, and the time at 0% that is left over the weights that are, by method and sparsity."""
    document = load(name)
    records = {(r["method"], r["sparsity"]): r for r in document["records"]}
    sparsities = sorted({key[1] for key in records})
    rows = []
    for method in dict.fromkeys(key[0] for key in records):
        found = [records[method, sparsity] for sparsity in sparsities]
        whole = found[0]
        left = [r["time_us"] / whole["time_us"] / (r["weights_read"] / whole["weights_read"]) for r in found]
        rows.append([f"`{method}`", "ms", *(f"{r['time_us'] / 1e3:.2f}" for r in found)])
        rows.append(["", "× dense", *(f"**{r['speedup']:.2f}**" for r in found)])
        rows.append(["", "of the floor", *(f"{r['floor_share']:.0%}" for r in found)])
        rows.append(["", "time / bytes", *(f"{share:.2f}" for share in left)])
    first = document["records"][0]
    variants = ", ".join(f"{label} {us / 1e3:.2f} ms" for label, us in first["dense_times_us"].items())
    note = (
        f"\n{_shape(first)}, one token, threads: {first['threads']}. Dense: {variants}; × is against the faster. "
        "Time / bytes: share of the time at 0% over share of the weights read at 0%.\n"
    )
    return table(["", "", *(f"{s:.0%}" for s in sparsities)], rows, left=2) + note + _source(name, document)


def headline(ffns: str, decoding: str, quality: str) -> str:
    """Return in a few sentences what 80% brings, and what it costs a small model."""
    at = {r["method"]: r for r in load(ffns)["records"] if r["sparsity"] == 0.8}
    runs = {r.get("method", r["run"]): r["tokens_per_s"] for r in load(decoding)["records"]}
    dense = load(quality)["records"][0]["dense_perplexity"]
    cost = {
        r["method"]: r["perplexity"]
        for r in load(quality)["records"]
        if (r["weighting"], r.get("bits")) == QUALITY.get(r["method"])
        and (r["decision"], r["sparsity"]) == ("threshold", 0.8)
    }
    m, proxy = (at[name]["speedup_to_fused_cublas"] for name in ("m-countdown", "d-proxy"))
    return (
        f"On one H200 in bf16, with 80% of neurons skipped, an FFN of Llama-3.1-8B's size runs {m:.1f} (`m-countdown`) "
        f"and {proxy:.1f} (`d-proxy`) times as fast as cuBLAS; the whole model of that shape decodes at "
        f"{runs['m-countdown']:.0f} and {runs['d-proxy']:.0f} tokens/s, the dense one at {runs['dense']:.0f} in the "
        f"same loop and at {runs['generate']:.0f} in Hugging Face's `generate`. What that costs is another matter: "
        f"perplexity of Gemma-3-270M rises from {dense:.1f} to {cost['d-proxy']:.1f} with `d-proxy`, to "
        f"{cost['m-countdown']:.1f} with weighted `m-countdown`."
    )


def launches(name: str) -> str:
    """Return × dense by method and sparsity of the floor and an empty call together, and the share that is reached."""
    document = load(name)
    records = {(r["method"], r["sparsity"]): r for r in document["records"]}
    sparsities = sorted({key[1] for key in records if key[1] < 1})
    empty, dense = records["given", 1.0]["time_us"], document["records"][0]["dense_times_us"][FUSED]
    rows = []
    for method in METHODS:
        found = [records[method, sparsity] for sparsity in sparsities]
        sums = [r["floor_us"] + empty for r in found]
        cells = [f"{dense / us:.2f} ({us / r['time_us']:.0%})" for us, r in zip(sums, found, strict=True)]
        rows.append([f"`{method}`", *cells])
    note = (
        f"\n× dense that the floor and an empty call, {empty:.1f} µs, would be together; in brackets, the share of it "
        "that is reached. A yardstick, no bound: kernels that only read can pass the bandwidth of a copy, as at 0%.\n"
    )
    return table(["", *(f"{s:.0%}" for s in sparsities)], rows) + note + _source(name, document)


def second_card(name: str) -> str:
    """Return what 80% brings against cuBLAS on another card."""
    at = {r["method"]: r["speedup_to_fused_cublas"] for r in load(name)["records"] if r["sparsity"] == 0.8}
    return f"at 80% `m-countdown` is {at['m-countdown']:.2f} × dense there, `d-proxy` {at['d-proxy']:.2f}"


def versus(names: list[str]) -> str:
    """Return the range, over runs, of the dense loop's and of the sparse models' speed over llama.cpp's."""
    ratios: dict[str, list[float]] = {"dense": [], "sparse": []}
    for name in names:
        runs = load(name)["records"]
        best = max(r["tokens_per_s"] for r in runs if r.get("format") in ("BF16", "F16"))
        for r in runs:
            if r["run"] in ratios:
                ratios[r["run"]].append(r["tokens_per_s"] / best)
    dense, sparse = (f"{min(found):.2f} to {max(found):.2f} times" for found in ratios.values())
    return f"{dense} as fast as llama.cpp in the faster of its 16-bit formats, sparse models {sparse}"


def calibration(name: str) -> str:
    """Return in a sentence how long calibration takes, without a method and with one."""
    document = load(name)
    minutes = {r["method"]: r["seconds"] / 60 for r in document["records"]}
    meta = document["meta"]
    return (
        f"SmolLM2-135M took {minutes['auto']:.0f} minutes on {meta['hardware']['cores']} CPU cores, "
        f"{minutes['d-proxy']:.1f} with `--method d-proxy`, {minutes['m-countdown']:.1f} with `--method m-countdown` "
        f"(commit {meta['commit'][:8]}, {meta['date'][:10]})"
    )


def commands(name: str) -> str:
    """Return in a sentence how long the README's commands take, those of which succeeded."""
    document = load(name)
    found = []
    for record in document["records"]:
        # Without arguments, but with what makes two of them differ.
        words = record["command"].removeprefix("countdown ").split(" MODEL")
        said = " ".join([words[0].replace(" comparison", ""), *({"--quick", "--compare"} & set(words[-1].split()))])
        if record["status"] == 0:
            seconds = record["seconds"]
            found.append(f"`{said}` {f'{seconds:.0f} s' if seconds < 60 else f'{seconds / 60:.1f} min'}")
    meta = document["meta"]
    return (
        f"On {meta['hardware']['cores']} CPU cores SmolLM2-135M took: {', '.join(found)} "
        f"(commit {meta['commit'][:8]}, {meta['date'][:10]})"
    )


def shapes(name: str) -> str:
    """Return × dense and share of the floor by shape."""
    document = load(name)
    records = {(r["d"], r["h"], r["method"], r["sparsity"]): r for r in document["records"]}
    sparsities = sorted({key[3] for key in records})
    columns = [(method, s) for method in METHODS if method != "cats" for s in sparsities]
    rows = []
    for d, h in dict.fromkeys(key[:2] for key in records):
        found = [records[d, h, *column] for column in columns]
        cells = [f"{r['speedup']:.2f} ({r['floor_share']:.0%})" for r in found]
        rows.append([f"{d} × {h}", f"{found[0]['dense_time_us']:.1f}", *cells])
    head = ["d × h", "dense µs", *(f"`{method}` {s:.0%}" for method, s in columns)]
    note = "\n× the faster of cuBLAS with gate and up fused or split, one token; in brackets, share of the floor.\n"
    return table(head, rows) + note + _source(name, document)


def tokens(name: str) -> str:
    """Return µs and share of the floor by number of tokens."""
    document = load(name)
    records = {(r["method"], r["sparsity"], r["tokens"]): r for r in document["records"]}
    counts = sorted({key[2] for key in records})
    rows = []
    for method, sparsity in dict.fromkeys(key[:2] for key in records):
        found = [records[method, sparsity, count] for count in counts]
        cells = [f"{r['time_us']:.0f} ({r['union']:.0%} needed, {r['floor_share']:.0%})" for r in found]
        rows.append([f"`{method}`", f"{sparsity:.0%}", *cells])
    dense = [next(r["dense_time_us"] for r in records.values() if r["tokens"] == count) for count in counts]
    rows.insert(0, ["dense", "", *(f"{us:.0f}" for us in dense)])
    note = "\nµs; in brackets, the neurons that some token needs, and the share of the floor.\n"
    return table(["", "sparsity", *(f"{n} tokens" for n in counts)], rows, left=2) + note + _source(name, document)


def decode(name: str) -> str:
    """Return tokens/s, and where a token's time goes, by run."""
    document = load(name)
    rows = []
    for r in document["records"]:
        if "split_us" not in r:
            other = "Hugging Face generate" if r["run"] == "generate" else f"{r['run']} {r['format']}"
            rows.append([f"{other}, dense", f"{r['tokens_per_s']:.1f}", *[""] * 8])
            continue
        # Of single linears that are sparse the parts are not known.
        split = r["split_us"]
        parts = [f"{split[part]:.0f}" if split else "" for part in ("ffn", "attention_linears", "head", "rest")]
        floor = f"{1e6 / r['floor_us']:.0f} ({r['floor_share']:.0%})"
        prefill = f"{r['prefill_ms']:.1f} ({r['prefill_ratio']:.3f})"
        rows.append([_run(r), f"**{r['tokens_per_s']:.1f}**", f"{r['speedup']:.2f}", floor, *parts, prefill])
    first = document["records"][0]
    head = ["", "tokens/s", "× dense", "floor", "FFN µs", "attention's linears", "head", "rest", "prefill ms (×)"]
    weights = "random weights, " if "-" in name and first["model"].islower() else ""
    note = (
        f"\n{first['model']}, {weights}{first['layers']} layers, vocabulary {first['vocab']:,}, batch 1, "
        f"context {first['context']}, {first['new_tokens']} tokens timed"
        f"{', threads: ' + str(first['threads']) if 'threads' in first else ''}.\n"
    )
    return table(head, [cells[: len(head)] for cells in rows]) + note + _source(name, document)


def together(name: str) -> str:
    """Return tokens/s of answers at a time, and in brackets what that is to the dense model in the same rounds."""
    document = load(name)
    counts = sorted({r["answers"] for r in document["records"]})
    cells: dict[str, list[str]] = {}
    for r in document["records"]:
        label = (
            f"`{r['method']}` at {r['sparsity']:.0%}, sparse up to {r['sparse_up_to']}" if "sparsity" in r else "dense"
        )
        cells.setdefault(label, []).append(f"{r['tokens_per_s']:.0f} ({r['to_dense']:.2f})")
    head = ["", *(f"{count} answer{'s' * (count > 1)}" for count in counts)]
    rows = [[label, *values] for label, values in cells.items()]
    return table(head, rows) + f"\n{document['records'][0]['model']}.\n" + _measured(name, document)


def engine(names: Sequence[str]) -> str:
    """Return what the engine does by arms, and in brackets that to the arm that it is compared with."""
    found = ""
    for name in names:
        document = load(name)
        arms: dict[str, dict[str, str]] = {}
        for r in document["records"]:
            label = f"`{r['method']}` at {r['sparsity']:.0%}" if "sparsity" in r else "dense"
            if r["arm"] != "memory":
                arms.setdefault(r["arm"] + f", {r['prompt']} tokens read", {})[label] = _of_engine(r)
        labels = list(next(iter(arms.values())))
        rows = [[arm, *(by[label] for label in labels)] for arm, by in arms.items()]
        found += table(["", *labels], rows) + _measured(name, document) + "\n"
    return found.removesuffix("\n")


def _of_engine(r: dict[str, Any]) -> str:
    if "tokens_per_s" in r:
        return f"{r['tokens_per_s']:.1f} tokens/s" + (f" ({r['share']:.3f})" if "share" in r else "")
    return f"{r['seconds'] * 1e3:,.0f} ms" + (f" ({r['ratio']:.2f})" if "ratio" in r else "")


def predicting(names: Sequence[str]) -> str:
    """Return µs without and with what is predicted, and the difference over the time that its bytes take."""

    def term(plain: dict[str, Any], predicted: dict[str, Any]) -> str:
        more, bytes_ = (predicted[key] - plain[key] for key in ("time_us", "floor_us"))
        return f"{_us(plain)} → {_us(predicted)} ({more / bytes_:.2f})"

    return _pairs(names, ("", 0.0), ("affine", 0.0), term)


def looking(names: Sequence[str]) -> str:
    """Return µs of one look and of two, and their ratio."""

    def ratio(one: dict[str, Any], two: dict[str, Any]) -> str:
        return f"{_us(one)} → {_us(two)} ({two['time_us'] / one['time_us']:.2f})"

    return _pairs(names, ("", 0.0), ("", SECOND_LOOK), ratio)


def _pairs(
    names: Sequence[str],
    first: tuple[str, float],
    second: tuple[str, float],
    cell: Callable[[dict[str, Any], dict[str, Any]], str],
) -> str:
    """Return cells of two records of each method and sparsity, told apart by compensation and second look."""
    rows, sources = [], ""
    for name in names:
        document = load(name)
        found = {
            (r["method"], (r["compensate"], r.get("second_look", 0.0)), r["sparsity"]): r for r in document["records"]
        }
        sparsities = sorted({key[2] for key in found})
        for method in dict.fromkeys(key[0] for key in found):
            if (method, second, sparsities[0]) not in found:
                continue
            cells = [cell(found[method, first, s], found[method, second, s]) for s in sparsities]
            rows.append([f"`{method}`", _place(document), *cells])
        sources += f"\n{_shape(document['records'][0])}, one token; {_source(name, document)}"
    return table(["", "", *(f"{s:.0%}" for s in sparsities)], rows, left=2) + sources


def _us(r: dict[str, Any]) -> str:
    return f"{r['time_us']:.0f}" if "threads" in r else f"{r['time_us']:.1f}"


def _place(document: dict[str, Any]) -> str:
    """Return what computed: a GPU's name, or so many threads."""
    threads = document["records"][0].get("threads")
    if threads is None:
        return str(document["meta"]["hardware"]["gpu"])
    return f"{threads} thread{'s' if threads > 1 else ''}"


def contexts(names: Sequence[str]) -> str:
    """Return tokens/s, attention's share and the cache's size, by context."""
    rows, sources = [], ""
    for name in names:
        document = load(name)
        first = document["records"][0]
        for r in document["records"]:
            share = (r["token_us"] - first["token_us"] + first["attention_us"]) / r["token_us"]
            label = f"{r['model']}, {r['method']}" + (f" at {r['sparsity']:.0%}" if "sparsity" in r else "")
            size = f"{r['cache_bytes'] / 2**20:,.0f} MiB"
            rows.append([label, f"{r['context']:,}", f"{r['tokens_per_s']:.1f}", f"{share:.0%}", size])
        sources += _measured(name, document)
    return table(["", "context", "tokens/s", "attention", "cache"], rows) + sources


def random_rows(name: str) -> str:
    """Return GB/s of rows, by their length and which of them are read, unaided and fetched ahead."""
    document = load(name)
    found = {
        (r["threads"], r["row_bytes"], r["share"]): f"{r['gb_per_s']:.0f} → {r['fetched_gb_per_s']:.0f}"
        for r in document["records"]
    }
    threads, lengths, shares = (sorted({key[place] for key in found}) for place in range(3))
    cases = [(t, s) for t in threads for s in reversed(shares)]
    head = [f"{'all' if s == 1 else f'{s:.0%}'}, {t} thread{'s' if t > 1 else ''}" for t, s in cases]
    rows = [[f"{length} bytes", *(found[t, length, s] for t, s in cases)] for length in lengths]
    meta = document["meta"]
    return table(["a row", *head], rows) + (
        f"\nGB/s of the rows that are read, unaided → fetched ahead. {meta['hardware']['cpu']}, {_from(name, meta)}\n"
    )


def linears(name: str) -> str:
    """Return µs of sparse linears and the dense ones, by what reads the same input and by threads."""
    document = load(name)
    meta = document["meta"]
    gpu = "gpu" in meta["hardware"]
    against = ["dense", "fused"] if gpu else ["dense"]
    ranked = any(record.get("alpha", 1.0) < 1 for record in document["records"])
    rows = []
    for record in document["records"]:
        shapes = "; ".join(f"{d} → {' + '.join(map(str, heights))}" for d, *heights in record["shapes"])
        rows.append(
            [
                f"{record['linears']} ({shapes})" if len(record["shapes"]) == 1 else record["linears"],
                *([] if gpu else [str(record["threads"])]),
                f"{record['sparsity']:.0%}",
                *([f"{record['alpha']:g}"] if ranked else []),
                *(f"{record[f'{arm}_us']:.1f}" for arm in against),
                f"{record['sparse_us']:.1f}",
                *(f"**{record[f'speedup_over_{arm}']:.2f}**" for arm in against),
                f"{record['over_floor']:.2f}",
            ]
        )
    arms = ["dense, µs", "fused, µs"] if gpu else ["dense, µs"]
    head = ["linears", *([] if gpu else ["threads"]), "sparsity", *(["α"] if ranked else []), *arms, "sparse, µs"]
    head += ["× dense", "× fused", "over the floor"] if gpu else ["× dense", "over the floor"]
    dtype, rate = document["records"][0]["dtype"], document["records"][0]["bytes_s"]
    return table(head, rows) + (
        "\nOne token; medians over rounds in which all took turns. Floor: bytes that are read at "
        f"{rate / 1e9:.0f} GB/s. "
        f"{meta['hardware'].get('gpu') or meta['hardware']['cpu']}, {dtype}, {_from(name, meta)}\n"
    )


def busy_cores(name: str) -> str:
    """Return tokens/s of the decode loop beside busy processes, on the usual threads and on one."""
    document = load(name)
    found = {(r["busy"], r["arm"]): r for r in document["records"]}
    meta = document["meta"]
    threads = meta["hardware"]["threads"]
    others = [arm for _, arm in found if arm not in ("default", "one thread")]
    arms = ["default", "one thread", *dict.fromkeys(others)]
    rows = [
        [
            str(busy),
            *(f"{found[busy, arm]['tokens_per_s']:.1f}" for arm in arms),
            f"{found[busy, 'default']['speedup_over_one_thread']:.2f}",
        ]
        for busy in sorted({busy for busy, _ in found})
    ]
    head = ["busy processes", f"{threads} threads, as by default", *arms[1:], "the first over one thread"]
    return table(head, rows) + (
        f"\nTokens/s; ratios are medians over rounds in which all took turns. {meta['hardware']['cpu']}, "
        f"{meta['hardware']['cores']} shared cores, {_from(name, meta)}\n"
    )


def passes(names: Sequence[str]) -> str:
    """Return how fast passes over a text are, against the dense model's."""
    rows, sources = [], []
    for name in names:
        document = load(name)
        meta = document["meta"]
        hardware = meta["hardware"]
        where = hardware["gpu"] if "gpu" in hardware else f"{hardware['threads']} CPU cores"
        for record in document["records"]:
            rows.append(
                [
                    f"{record['model'].split('.Q')[0]}, {where}",
                    f"`{record['method']}`, {record['decision']}",
                    f"{record['dense_tokens_per_s']:,.0f}",
                    f"{record['share_of_dense']:.0%}",
                    f"{record['share_of_dense_low']:.0%} to {record['share_of_dense_high']:.0%}",
                    f"{record['calibration_tokens_per_s']:,.0f}",
                ]
            )
        sources.append(f"{hardware.get('gpu') or hardware['cpu']}, {_from(name, meta)}\n")
    head = [
        "model",
        "method",
        "dense, tokens/s",
        "sparse pass of it",
        "lowest to highest round",
        "calibration, tokens/s",
    ]
    return table(head, rows, left=2) + "\n" + "".join(sources)


def _run(record: dict[str, Any]) -> str:
    """Return what was run: a recipe of several methods has no sparsity of its own."""
    if record["run"] == "dense":
        return "dense"
    return f"`{record['method']}`" + (f" at {record['sparsity']:.0%}" if "sparsity" in record else "")


def _shape(record: dict[str, Any]) -> str:
    return f"d {record['d']}, h {record['h']}"


def _source(name: str, document: dict[str, Any]) -> str:
    meta, first = document["meta"], document["records"][0]
    gpu = meta["hardware"].get("gpu")
    bandwidth = f"{first['bandwidth'] / 1e12:.2f} TB/s" if gpu else f"{first['bandwidth'] / 1e9:.1f} GB/s"
    return (
        f"{gpu or meta['hardware']['cpu']}, {first['dtype']}, {'copy' if gpu else 'read'} bandwidth {bandwidth}, torch "
        f"{meta['versions']['torch']}, {_from(name, meta)}\n"
    )


def _from(name: str, meta: dict[str, Any]) -> str:
    """Return where figures come from."""
    return f"commit {meta['commit'][:8]}, {meta['date'][:10]}; `{meta['command']}`; `benchmarks/results/{name}.json`."


def serving(name: str, soak: str) -> str:
    """Return what the engine and the server do, and beside what."""
    document, long = load(name), load(soak)
    rows = []
    # The soak of the first file is a short one.
    for record in [*(r for r in document["records"] if r["arm"] != "soak"), *long["records"]]:
        beside = record.get("share") or record.get("ratio")
        value = f"{record['tokens_per_s']:.1f} tokens/s" if "tokens_per_s" in record else ""
        value = f"{record['seconds']:.2f} s" if "seconds" in record else value
        if record["arm"] == "soak":
            memory = record["resident_mb"]
            value = (
                f"{record['requests'] + record['other_answers']} answers, {record['other_answers']} of them other than "
                f"alone, {record['refused']} refused; resident {memory[0]:.0f} MB at first, {memory[-1]:.0f} at last"
            )
            about = f"{record['clients']} clients, {record['minutes']:g} minutes"
        else:
            about = record["arm"] + (f", {record['prompt']} tokens of prompt" if "prompt" in record else "")
        compared = f"{beside:.2f} × {record['of']}" if beside else ""
        if "ours_to_it" in record:
            compared = f"ours is {record['ours_to_it']:.2f} times as fast"
        rows.append([about, value, compared])
    first = document["records"][0]
    note = f"\n{first['model']}, {first['profile']}; medians over rounds in turn; the client runs on the same cores.\n"
    return table(["", "", ""], rows, left=3) + note + _measured(name, document) + _measured(soak, long)


def _measured(name: str, document: dict[str, Any]) -> str:
    meta = document["meta"]
    hardware = meta["hardware"]
    return (
        f"\n{hardware['cpu']}, {hardware['threads']} threads, torch {meta['versions']['torch']}, commit "
        f"{meta['commit'][:8]}, {meta['date'][:10]}; `{meta['command']}`; `benchmarks/results/{name}.json`.\n"
    )


def cases() -> str:
    """Return what somebody gets, by what they have: measured rows of other tables."""
    gpu, cpu = load("gpu-decode-h200")["records"], load("cpu-decode-1.5b")["records"]
    own = {r["arm"]: r for r in load("serving-smollm2")["records"]}
    at = [{r.get("method", r["run"]): r for r in records} for records in (gpu, cpu)]

    def rates(found: dict[str, dict[str, Any]]) -> str:
        dense, proxy = found["dense"]["tokens_per_s"], found["d-proxy"]["tokens_per_s"]
        return f"{dense:.0f} tokens/s dense, {proxy:.0f} with `d-proxy` skipping 80%"

    hugging, client = at[0]["generate"]["tokens_per_s"], own["server, one client"]["tokens_per_s"]
    rows = [
        ["one H200, a model of 8 billion weights, one sequence", f"{rates(at[0])} (`benchmark decode`); Hugging Face's "
         f"`generate` {hugging:.0f}"],
        ["two CPU cores, a model of 1.5 billion weights", f"{rates(at[1])} (`benchmark decode`)"],
        ["two CPU cores, SmolLM2-135M, one person", f"{client:.0f} tokens/s from `serve`, dense; first token after "
         f"{own['first token, nothing traced']['seconds']:.1f} s with nothing prepared"],
        ["the same, eight people at a time", f"{own['server, 8 clients']['tokens_per_s']:.0f} tokens/s in all"],
    ]  # fmt: skip
    files = ("gpu-decode-h200", "cpu-decode-1.5b", "serving-smollm2")
    return table(["your case", "what you get"], rows, left=2) + f"\n{', '.join(f'`{name}.json`' for name in files)}.\n"
