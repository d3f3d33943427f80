"""Draws docs/images/front.svg: perplexity against weights read, from benchmarks/results/quality-smollm2.json."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

from tables import load

matplotlib.use("svg")
from matplotlib import pyplot

LINES = {
    ("m-countdown", "none", "threshold"): ("m-countdown", "#2a78d6", "--"),
    ("m-countdown", "rms", "threshold"): ("m-countdown, weighting rms", "#2a78d6", "-"),
    ("cats", "none", "threshold"): ("cats", "#d9730d", "--"),
    ("cats", "rms", "threshold"): ("cats, weighting rms", "#d9730d", "-"),
}
INK = "#70757d"  # legible on GitHub's light and dark pages


def main() -> None:
    """Write the picture."""
    records = load("quality-smollm2")["records"]
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "countdown", "font.size": 11})
    for setting in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[setting] = INK
    figure, axes = pyplot.subplots(figsize=(7.5, 4))
    axes.spines[["top", "right"]].set_visible(False)
    for key, (label, colour, style) in LINES.items():
        points = sorted(
            (r["weights_read"], r["perplexity"])
            for r in records
            if (r["method"], r["weighting"], r["decision"]) == key and r["sparsity"] <= 0.7
        )
        axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=label)
    dense = records[0]["dense_perplexity"]
    axes.axhline(dense, color=INK, linestyle=":", linewidth=1)
    axes.annotate("dense", (0.01, dense - 1), xycoords=("axes fraction", "data"), va="top")
    axes.set_xlabel("share of the FFN's weights read (50%, 60% and 70% of neurons skipped)")
    axes.set_ylabel("perplexity, WikiText-2")
    axes.set_ylim(bottom=30)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    target = Path(__file__).parent.parent / "docs" / "images" / "front.svg"
    target.write_text("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
