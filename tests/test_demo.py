"""What the demo found, as a comparison, and tokens as text."""

from __future__ import annotations

import pytest

from countdown.demo import Demo, DemoRow, _pieces, as_comparison
from countdown.evaluation.evaluate import Evaluation, LayerSparsity
from countdown.evaluation.generation import Generation
from countdown.methods import method
from countdown.report.html import render

LAYERS = [LayerSparsity("layers.0.mlp", 0.5, 0.51)]


def row(sparsity: float) -> DemoRow:
    found = Evaluation("all", 100, 44.0, 40.0, 0.1, 0.9, 0.51, weights_read=0.6, layers=LAYERS)
    return DemoRow(method("cats", sparsity=sparsity), found)


@pytest.fixture
def demo():
    about = {"source": "python-docs", "split": "evaluation", "sha256": "abc"}
    rows = [row(0.3), row(0.5)]
    dense, sparse = Generation([1, 2], "yes no", 12.3), Generation([1, 9], "yes nay", None)
    return Demo(
        "tiny", about, about, rows, "2 < 3?", rows[1].method, dense, sparse, ["yes", " no"], ["yes", " nay"],
        profile=None, ffn_share=0.5,
    )  # fmt: skip


def test_every_row_becomes_a_configuration_beside_dense(demo):
    cells = as_comparison(demo).cells
    assert [cell.label for cell in cells] == ["dense", "cats at 0.3", "cats at 0.5"]
    assert cells[0].quality.perplexity == 40.0
    assert cells[1].quality.loss == pytest.approx(0.1)
    assert cells[1].weights_read == pytest.approx(0.8)  # half of a token's bytes are read at 60%
    assert [cell.sample and cell.sample.pieces for cell in cells] == [["yes", " no"], None, ["yes", " nay"]]


def test_its_report_has_the_numbers_the_caveat_and_no_advice(demo):
    html = render(as_comparison(demo))
    assert "Nothing was asked for, so nothing is recommended" in html
    assert "<td>44.00</td><td>+10.0%</td><td></td>" in html
    assert demo.caveat in html
    assert "<mark> nay</mark>" in html


def test_a_character_of_several_tokens_comes_with_its_last():
    class Tokenizer:
        def decode(self, tokens: list[int], **_: object) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    assert _pieces(Tokenizer(), list("aé!".encode())) == ["a", "", "é", "!"]
