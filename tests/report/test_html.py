"""The report is one file that asks for nothing, holds the numbers, and escapes what models write."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

import countdown
from conftest import llama
from countdown.calibration.text import windows
from countdown.demo import Demo, DemoRow
from countdown.evaluation.evaluate import evaluate
from countdown.evaluation.generation import Generation
from countdown.methods import method
from countdown.report.html import render


@pytest.fixture(scope="module")
def demo(tokenizer, text):
    model, rows = llama(), []
    for name in ("m-countdown", "cats"):
        for sparsity in (0.3, 0.6):
            config = method(name, sparsity=sparsity)
            profile = countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)
            countdown.sparsify_(model, profile)
            rows.append(DemoRow(config, evaluate(model, windows(tokenizer, text, count=2, length=32), progress=False)))
            countdown.restore_(model)
    about = {"source": "python-docs", "split": "evaluation", "sha256": "abc"}
    return Demo(
        model="Tiny <b>",
        calibration=about,
        text=about,
        rows=rows,
        prompt="2 < 3?",
        shown=rows[0].method,
        dense=Generation([1, 2, 3], "yes <script>alert(1)</script>", 12.34, "decode loop"),
        sparse=Generation([1, 9], "no & never", None, "transformers"),
        profile=profile,
    )


class _Tags(HTMLParser):
    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html(demo):
    return render(demo)


def test_every_number_is_in_the_table(demo, html):
    for row in demo.rows:
        e = row.evaluation
        assert f"<td>{e.perplexity:.2f}</td><td>{e.kl:.3f}</td><td>{100 * e.top1:.1f}%</td>" in html
    assert f"<td>{demo.rows[0].evaluation.dense_perplexity:.2f}</td>" in html
    assert "12.3 tokens/s" in html
    assert "the same tokens up to number 1" in html


def test_it_is_well_formed_and_asks_for_nothing(html):
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    addresses = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in addresses)
    assert not re.search(r"url\((?!#)", html)
    assert "svg" in tags.seen


def test_what_models_write_is_escaped(html):
    assert "&lt;script&gt;alert(1)" in html
    assert "no &amp; never" in html


def test_the_plot_has_a_line_for_each_method_in_the_pages_own_ink(html):
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "m-countdown" in svg
    assert "cats" in svg
    assert "currentColor" in svg
