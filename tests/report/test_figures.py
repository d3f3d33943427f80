"""What figures show: their data, which configurations, and what they leave out."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from countdown.comparison.comparison import Cell, Comparison
from countdown.report.figures import all_figures
from report.sample import sample


def changed(comparison: Comparison, label: str, **quality: float) -> Comparison:
    def change(cell: Cell) -> Cell:
        return replace(cell, quality=replace(cell.quality, **quality)) if cell.label == label else cell

    return replace(comparison, cells=[change(cell) for cell in comparison.cells])


def tips(svg: str) -> list[str]:
    return re.findall(r"<g><title>([^<]*)</title>", svg)


@pytest.fixture(scope="module")
def figures():
    return all_figures(sample())


def test_the_front_has_every_configuration_with_quality_and_speed(figures):
    expected = {cell.label for cell in sample().cells if cell.quality and cell.speed}
    assert {tip.partition(":")[0] for tip in tips(figures["speed"].svg)} == expected
    assert "int4: 1.38×, perplexity +8.3%" in tips(figures["speed"].svg)


def test_the_front_names_dense_quantised_and_recommended(figures):
    for name in ("speed", "weights"):
        for label in ("dense", "int8", "int4", "d-proxy at 0.5"):
            assert re.search(rf"<text[^>]*>{label}</text>", figures[name].svg)
        assert "recommended" in figures[name].svg


def test_the_data_of_the_front_are_its_numbers(figures):
    rows = {row[0]: row[1:] for row in figures["speed"].rows}
    cell = next(cell for cell in sample().cells if cell.label == "cats + rms at 0.5")
    assert rows["cats + rms at 0.5"][:2] == [f"{cell.speed.speedup:.2f}×", f"{100 * cell.quality.loss:+.2f}%"]
    assert rows["teal at 0.5"][0] == "–"


def test_quantised_models_that_are_absent_are_missed(figures):
    assert "Not measured and so not drawn: quantised dense as fp8." in figures["speed"].caption
    none = replace(sample(), cells=[cell for cell in sample().cells if cell.kind != "quantised"])
    assert "No quantised dense model was measured." in all_figures(none)["speed"].caption


def test_what_is_not_finite_is_in_the_table_and_not_in_the_plot():
    broken = changed(sample(), "teal at 0.7", perplexity=math.inf, loss=math.nan)
    figures = all_figures(broken)
    assert "teal at 0.7: perplexity" not in " ".join(tips(figures["perplexity"].svg))
    assert "teal at 0.6: perplexity" in " ".join(tips(figures["perplexity"].svg))
    assert next(row for row in figures["weights"].rows if row[0] == "teal at 0.7")[2] == "–"


def test_an_interval_may_be_missing():
    figures = all_figures(changed(sample(), "teal at 0.5", loss_interval=(math.nan, math.nan)))
    assert next(row for row in figures["weights"].rows if row[0] == "teal at 0.5")[3] == ""
    assert "teal at 0.5" in " ".join(tips(figures["weights"].svg))


def test_a_loss_below_dense_can_be_drawn():
    figures = all_figures(changed(sample(), "int8", loss=-0.03, loss_interval=(-0.04, -0.02)))
    assert "int8: 1.12×, perplexity -3.0%" in tips(figures["speed"].svg)
    assert "-2%" in figures["speed"].svg
    assert "\N{MINUS SIGN}" not in "".join(figure.svg or "" for figure in figures.values())


def test_perplexity_has_lines_by_method_and_levels_without_sparsity(figures):
    rows = {row[0]: row[1:] for row in figures["perplexity"].rows}
    assert figures["perplexity"].header[2:] == ["30%", "50%", "60%", "70%"]
    assert rows["dense"] == ["38.80", "", "", "", ""]
    assert rows["m-countdown"][:2] == ["", "–"]  # 30% was not measured
    assert set(rows) == {"dense", "int8", "int4", "m-countdown", "m-countdown + rms", "cats + rms", "d-proxy", "teal"}


def test_layers_are_shown_for_one_sparsity_of_each_method(figures):
    assert figures["realised"].header == [
        "layer",
        *(f"{method} at 0.5" for method in ("m-countdown", "m-countdown + rms", "cats + rms", "d-proxy", "teal")),
    ]
    assert len(figures["realised"].rows) == 30
    assert "the sparsity nearest 50%" in figures["realised"].caption


def test_recall_leaves_out_what_has_none(figures):
    assert {row[0] for row in figures["recall"].rows} == {
        f"{method} at 0.5" for method in ("m-countdown", "m-countdown + rms", "cats + rms", "d-proxy")
    }


def test_activity_has_a_band_for_the_recommended_method(figures):
    assert "The band has every layer of d-proxy at 0.5 in it." in figures["activity"].caption
    assert len(figures["activity"].rows) == 64


def test_times_are_split_where_they_are_known(figures):
    header, rows = figures["times"].header, {row[0]: row for row in figures["times"].rows}
    assert header[1:6] == ["FFN, ms", "attention's linears, ms", "head, ms", "rest, ms", "not split, ms"]
    assert rows["dense"][5] == "–"
    assert rows["int4"][1:6] == ["–", "–", "–", "–", "9.17"]
    dense = next(cell.speed for cell in sample().cells if cell.kind == "dense")
    assert rows["dense"][-3:] == ["12.66", "9.80", f"{100 * dense.floor_us / 12658.2:.0f}%"]


def test_short_times_are_in_microseconds():
    fast = [replace(c, speed=c.speed and replace(c.speed, tokens_per_s=10_000.0, split_us={})) for c in sample().cells]
    assert "token, µs" in all_figures(replace(sample(), cells=fast))["times"].header


def test_a_gpu_is_named_where_it_computed():
    meta = sample().meta | {"device": "cuda:0", "hardware": {"cpu": "Some CPU", "gpu": "Some GPU", "threads": 8}}
    measured = all_figures(replace(sample(), meta=meta))["speed"].measured
    assert measured.endswith("bfloat16, Some GPU.")
