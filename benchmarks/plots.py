"""Draws the pictures of docs/images from benchmarks/results/*.json."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from compensation_tables import MODELS
from documents import RESULTS, load
from speed import FUSED

matplotlib.use("svg")
from matplotlib import pyplot

BLUE, ORANGE, GREEN = "#2a78d6", "#d9730d", "#2c9a5b"
FRONT = {
    ("m-countdown", "none"): ("m-countdown", BLUE, "--"),
    ("m-countdown", "rms"): ("m-countdown, weighting rms", BLUE, "-"),
    ("cats", "none"): ("cats", ORANGE, "--"),
    ("cats", "rms"): ("cats, weighting rms", ORANGE, "-"),
}
PROXY = {
    ("d-proxy", "none", 4): ("d-proxy, 4 bits", GREEN, "-"),
    ("d-proxy", "none", 3): ("d-proxy, 3 bits", GREEN, "--"),
    ("m-countdown", "rms", None): ("m-countdown, weighting rms", BLUE, "-"),
    ("m-countdown", "none", None): ("m-countdown", BLUE, "--"),
    ("cats", "rms", None): ("cats, weighting rms", ORANGE, "-"),
}
BESIDE = {
    ("d-proxy", "none", False): ("d-proxy", GREEN, "--"),
    ("d-proxy", "affine", False): ("d-proxy + affine", GREEN, "-"),
    ("m-countdown", "none", False): ("m-countdown, weighting rms", BLUE, "--"),
    ("m-countdown", "none", True): ("its second look", BLUE, ":"),
    ("m-countdown", "affine", True): ("and affine", BLUE, "-"),
}
SPEED = {
    "given": ("active set known", ORANGE),
    "d-proxy": ("d-proxy, 4 bits", GREEN),
    "m-countdown": ("m-countdown", BLUE),
}
INK = "#70757d"  # legible on GitHub's light and dark pages


def main() -> None:
    """Write the pictures."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "countdown", "font.size": 11})
    for setting in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[setting] = INK
    front()
    speed("gpu-ffn-h200", FUSED, "copy", "cuBLAS", "speed")
    speed("cpu-ffn", None, "read", "torch", "speed-cpu")
    proxy()
    compensation()


def front() -> None:
    """Draw perplexity against weights read."""
    records = load("quality-smollm2")["records"]
    figure, axes = _axes()
    for (name, weighting), (label, colour, style) in FRONT.items():
        points = sorted(
            (r["weights_read"], r["perplexity"])
            for r in records
            if (r["method"], r["weighting"], r["decision"]) == (name, weighting, "threshold") and r["sparsity"] <= 0.7
        )
        axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=label)
    _dense_line(axes, records)
    axes.set_xlabel("share of the FFN's weights read (50%, 60% and 70% of neurons skipped)")
    axes.set_ylabel("perplexity, WikiText-2")
    axes.set_ylim(bottom=30)
    axes.legend(frameon=False)
    _write(figure, "front")


def speed(results: str, dense: str | None, bandwidth: str, yardstick: str, picture: str) -> None:
    """Draw speed-up against sparsity, with the floor of each method.

    Args:
        results: Results file of one shape and one token.
        dense: Which dense FFN to compare with; the fastest when None.
        bandwidth, yardstick: What the floor and the dense FFN are called.
        picture: Name of the picture.
    """
    records = [r for r in load(results)["records"] if r["sparsity"] < 1]
    times = records[0]["dense_times_us"]
    dense_us = min(times.values()) if dense is None else times[dense]
    figure, axes = _axes()
    for name, (label, colour) in SPEED.items():
        mine = sorted((r for r in records if r["method"] == name), key=lambda r: r["sparsity"])
        at = [r["sparsity"] for r in mine]
        axes.plot(at, [dense_us / r["time_us"] for r in mine], marker="o", color=colour, label=label)
        axes.plot(at, [dense_us / r["floor_us"] for r in mine], "--", color=colour, linewidth=1)
    axes.plot([], [], "--", color=INK, linewidth=1, label=f"floor: bytes at {bandwidth} bandwidth")
    axes.axhline(1, color=INK, linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 3, 5, 10], labels=["1", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.set_xticks([0, 0.5, 0.7, 0.8, 0.9], labels=["0%", "50%", "70%", "80%", "90%"])
    axes.set_xlabel("neurons skipped")
    axes.set_ylabel(f"× dense {yardstick}, one FFN")
    axes.legend(frameon=False)
    _write(figure, picture)


def proxy() -> None:
    """Draw perplexity against weights read of d-proxy and of methods without a proxy, for both models."""
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4))
    for axes, (name, title) in zip(both, (("smollm2", "SmolLM2-135M"), ("gemma3", "Gemma-3-270M")), strict=True):
        records = [r for r in load(f"quality-proxy-{name}")["records"] if r["decision"] == "threshold"]
        dense = records[0]["dense_perplexity"]
        for (method, weighting, bits), (label, colour, style) in PROXY.items():
            points = sorted(
                (r["weights_read"], r["perplexity"])
                for r in records
                if (r["method"], r["weighting"], r.get("bits")) == (method, weighting, bits)
            )
            if points:
                axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=label)
        axes.spines[["top", "right"]].set_visible(False)
        _dense_line(axes, records)
        axes.set_yscale("log")
        axes.set_ylim(0.92 * dense, 10 * dense)
        ticks = [round(dense * factor) for factor in (1, 1.5, 2, 3, 5, 10)]
        axes.set_yticks(ticks, labels=[str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{title}, dithered")
        axes.set_xlabel("share of the FFN's weights read")
    both[0].set_ylabel("perplexity, WikiText-2")
    both[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _write(figure, "proxy")


def compensation() -> None:
    """Draw the rise of perplexity against weights read, with and without what is predicted and a second look."""
    names = [name for name in MODELS if (RESULTS / f"quality-compensation-{name}.json").exists()]
    figure, every = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 4), squeeze=False)
    for axes, name in zip(every[0], names, strict=True):
        records = [r for r in load(f"quality-compensation-{name}")["records"] if r["calibrated_on"] == ["wikitext2"]]
        for (method, compensate, looks), (label, colour, style) in BESIDE.items():
            points = sorted(
                (r["weights_read"], r["perplexity"] / r["dense_perplexity"] - 1)
                for r in records
                if (r["method"], r["compensate"], bool(r.get("second_look"))) == (method, compensate, looks)
            )
            if points:
                axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yscale("log")
        ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
        axes.set_yticks(ticks, labels=[f"{tick:+.0%}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(MODELS[name])
        axes.set_xlabel("share of the FFN's weights read")
    every[0][0].set_ylabel("perplexity over dense, WikiText-2")
    every[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _write(figure, "compensation")


def _axes() -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(7.5, 4))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _dense_line(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    dense = records[0]["dense_perplexity"]
    axes.axhline(dense, color=INK, linestyle=":", linewidth=1)
    axes.annotate("dense", (0.01, dense * 0.985), xycoords=("axes fraction", "data"), va="top")


def _write(figure: Any, name: str) -> None:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    target = Path(__file__).parent.parent / "docs" / "images" / f"{name}.svg"
    target.write_text("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
