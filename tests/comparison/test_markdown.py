"""comparison.md: the numbers of the cells, where they belong, rounded so that they say the same."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from countdown.comparison.comparison import Cell, Comparison, TaskResult
from countdown.comparison.markdown import render
from report.sample import HOSTILE, hostile, nothing_measured, sample

PERPLEXITY, SPEED = "Perplexity, and its change against dense", "Tokens/s, and × dense in the same rounds"
ACC = "piqa, acc ± its standard error, and the difference from dense"


def section(markdown: str, title: str) -> str:
    (found,) = (part for part in re.split(r"^## ", markdown, flags=re.MULTILINE) if part.startswith(f"{title}\n"))
    return found


def table(markdown: str, title: str) -> dict[str, dict[str, str]]:
    """Return a table as its reader sees it: by row and column."""
    rows = [line for line in section(markdown, title).splitlines() if line.startswith("|")]
    header, rule, *cells = ([cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows)
    assert {len(row) for row in (header, rule, *cells)} == {len(header)}
    assert rule == ["---", *["---:"] * (len(header) - 1)]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in cells}


def changed(comparison: Comparison, label: str, /, **parts: object) -> Comparison:
    """Return a comparison with other values in one cell: `quality_loss=0.1` sets that of its quality."""

    def change(cell: Cell) -> Cell:
        for name, value in parts.items():
            part, _, inner = name.partition("_")
            cell = replace(cell, **{part: replace(getattr(cell, part), **{inner: value}) if inner else value})
        return cell

    return replace(comparison, cells=[change(c) if c.label == label else c for c in comparison.cells])


def with_tasks(**results: TaskResult) -> Comparison:
    made = sample()
    for label, result in results.items():
        made = changed(made, {"sparse": "d-proxy at 0.5"}.get(label, label), tasks=[result])
    about = {"piqa": {"limit": 500, "lm_eval": "0.4.13", "batch_size": 1, "content": "00ff"}}
    return replace(made, meta=made.meta | {"tasks": about})


DENSE = TaskResult("piqa", "acc", 500, 0.644, 0.02143, 0.0, (0.0, 0.0))
SPARSE = TaskResult("piqa", "acc", 500, 0.638, 0.02151, -0.006, (-0.0139, 0.0019))


def test_every_perplexity_stands_in_its_row_and_column():
    found = table(render(sample()), PERPLEXITY)
    assert list(found)[:2] == ["dense", "m-countdown"]
    assert list(found)[-3:] == ["int8", "int4", "fp8"]
    assert list(found["dense"]) == ["without sparsity", "30%", "50%", "60%", "70%"]
    for cell in sample().cells:
        name, _, sparsity = cell.label.partition(" at ")
        shown = found[name][f"{100 * float(sparsity):g}%" if sparsity else "without sparsity"]
        if cell.quality is None:
            assert shown == ("failed" if cell.error else "–")
        elif cell.kind == "dense":
            assert shown == f"{cell.quality.perplexity:.2f}"
        else:
            assert shown == f"{cell.quality.perplexity:.2f} ({100 * cell.quality.loss:+.1f}%)"
    assert found["int8"]["50%"] == found["teal"]["without sparsity"] == ""


def test_every_speed_stands_in_its_row_and_column():
    found = table(render(sample()), SPEED)
    assert found["dense"]["without sparsity"] == "79.0"
    speed = sample().cell("d-proxy at 0.5").speed
    assert found["d-proxy"]["50%"] == f"{speed.tokens_per_s:.1f} ({speed.speedup:.2f}×)"
    assert found["teal"]["30%"] == "–"
    assert found["fp8"]["without sparsity"] == "failed"


def test_an_unreliable_speed_up_is_not_shown():
    made = changed(sample(), "d-proxy at 0.5", speed_speedup=14.38, speed_interval=(13.9, 14.6))
    markdown = render(made)
    assert table(markdown, SPEED)["d-proxy"]["50%"].endswith(" (unreliable)")
    assert "14.38" not in markdown


def test_each_metric_of_a_task_has_a_table():
    norm = replace(SPARSE, metric="acc_norm", value=0.7)
    made = with_tasks(dense=DENSE, sparse=SPARSE)
    made = changed(made, "d-proxy at 0.5", tasks=[SPARSE, norm])
    markdown = render(made)
    found = table(markdown, ACC)
    assert found["dense"]["without sparsity"] == "0.6440 ± 0.0214"
    assert found["d-proxy"]["50%"] == "0.6380 ± 0.0215 (-0.0060)"
    assert found["d-proxy"]["30%"] == found["int8"]["without sparsity"] == "–"
    assert found["fp8"]["without sparsity"] == "failed"
    other = table(markdown, ACC.replace("acc", r"acc\_norm"))
    assert (other["dense"]["without sparsity"], other["d-proxy"]["50%"]) == ("–", "0.7000 ± 0.0215 (-0.0060)")
    assert "the first 500 documents of piqa, lm-eval 0.4.13, every token sparse" in section(markdown, ACC)


def test_a_metric_without_standard_error():
    shown = replace(SPARSE, value=1234.5, stderr=None, difference=12.25, difference_interval=None)
    assert table(render(with_tasks(sparse=shown)), ACC)["d-proxy"]["50%"] == "1,234.5000 (+12.2500)"


@pytest.mark.parametrize(
    ("parts", "title", "expected"),
    [
        ({"speed_speedup": 0.996, "speed_tokens_per_s": 90.0}, SPEED, "90.0 (0.996×)"),
        ({"speed_speedup": 1.0, "speed_tokens_per_s": 0.04}, SPEED, "0.04 (1.00×)"),
        ({"quality_perplexity": 1.0004, "quality_loss": 0.0002}, PERPLEXITY, "1.0004 (+0.02%)"),
        ({"quality_perplexity": 38.8, "quality_loss": -0.0001}, PERPLEXITY, "38.80 (-0.01%)"),
        ({"quality_perplexity": 38.8, "quality_loss": 0.0}, PERPLEXITY, "38.80 (+0.0%)"),
        ({"quality_perplexity": float("inf"), "quality_loss": float("inf")}, PERPLEXITY, "∞ (+∞%)"),
        ({"quality_perplexity": None, "quality_loss": None}, PERPLEXITY, "–"),
        (
            {"tasks": [replace(SPARSE, value=0.99997, stderr=0.00001, difference=-0.00003)]},
            ACC,
            "0.99997 ± 0.00001 (-0.00003)",
        ),
    ],
)
def test_no_number_is_rounded_to_what_it_is_not(parts, title, expected):
    assert table(render(changed(sample(), "d-proxy at 0.5", **parts)), title)["d-proxy"]["50%"] == expected


def test_sparsities_are_not_rounded():
    made = changed(changed(sample(), "teal at 0.5", sparsity=0.125), "teal at 0.6", sparsity=0.29)
    assert list(table(render(made), PERPLEXITY)["teal"]) == [
        "without sparsity",
        "12.5%",
        "29%",
        "30%",
        "50%",
        "60%",
        "70%",
    ]


def test_every_table_says_how_it_was_measured():
    made = with_tasks(dense=DENSE, sparse=SPARSE)
    calibration = {"source": "wikitext2", "sha256": "00ff", "tokens": 16384}
    made = replace(made, meta=made.meta | {"calibration": calibration})
    markdown = render(made)
    meta = made.meta
    for title in (PERPLEXITY, ACC, SPEED):
        line = section(markdown, title).splitlines()[2]
        for said in (meta["model"], meta["dtype"], meta["hardware"]["cpu"], "torch 2.13.0", "countdown 0.1.0"):
            assert said in line
        assert "calibrated on 16,384 tokens of wikitext2" in line
    perplexity, speed = section(markdown, PERPLEXITY), section(markdown, SPEED)
    tokens = sample().cells[0].quality.tokens
    assert (
        f"{tokens:,} scored tokens of wikitext2 in 16 windows of 512, every token sparse (protocol all)" in perplexity
    )
    assert "one sequence decoded after 128 tokens, 64 new ones" in speed
    assert "generated tokens sparse (protocol decode)" in speed


def test_versions_are_all_that_numbers_depend_on():
    versions = {"torch": "2.13.0", "torchao": "0.18.0"}
    made = replace(sample(), meta=sample().meta | {"identity": {"versions": versions}})
    assert "; torch 2.13.0, torchao 0.18.0." in section(render(made), PERPLEXITY)


def test_failures_and_caveats_are_told():
    markdown = render(sample())
    assert "- fp8: fp8 needs a GPU of compute capability 8.9 or more" in section(markdown, "Failed")
    assert f"- {sample().meta['caveats'][0]}" in section(markdown, "Caveats")


def test_what_was_not_measured_has_no_table():
    markdown = render(replace(sample(), cells=[replace(cell, speed=None) for cell in sample().cells]))
    assert SPEED not in markdown
    assert "piqa" not in markdown
    assert set(table(render(nothing_measured()), PERPLEXITY)["dense"].values()) <= {"–", "", "failed"}


def test_what_it_quotes_is_shown_as_it_is():
    markdown = render(hostile())
    assert HOSTILE not in markdown
    assert "\\<script\\>alert('é ∆ プロキシ" in markdown
    piped = changed(sample(), "int8", label="*.mlp: a|b_c\n`x`")
    assert r"\*.mlp: a\|b\_c \`x\`" in table(render(piped), PERPLEXITY)
