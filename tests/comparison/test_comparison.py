"""What a comparison holds, written and read again."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import pytest

from countdown.comparison.compare import check_same
from countdown.comparison.comparison import Cell, Comparison, Layer, Quality, Recommendation, Sample, Speed
from countdown.errors import ConfigError

META = {"model": "tiny", "caveats": ['one, and "two"'], "identity": {"model": "tiny", "versions": {"torch": "2.13"}}}


def quality(loss: float = 0.02, **more) -> Quality:
    return Quality(100, 12.5, loss, (loss - 0.01, loss + 0.01), 0.1 / 3, 0.9, window_nll=[2.1, 2.2 / 7], **more)


@pytest.fixture
def comparison() -> Comparison:
    layers = [Layer("layers.0.mlp", 0.5, 0.49, 0.9, 0.8, 0.01, [0.9, 0.1]), Layer("layers.1.mlp", 0.5, 0.51)]
    cells = [
        Cell("dense", "dense", {}, None, 1.0, 1.0, quality(0.0), Speed(100.0, 1.0, 9000.0, {"ffn": 1.5})),
        Cell(
            "m-countdown at 0.5", "sparse", {"method": "m-countdown", "weighting": "none"}, 0.5, 0.8, 0.67,
            quality(0.1, realised_sparsity=0.5, layers=layers), None, Sample([1, 2], ["Ä", ""]),
        ),
        Cell("int4", "quantised", {"quantised": "int4"}, None, error="no kernel"),
    ]  # fmt: skip
    return Comparison(META, cells, Recommendation("dense", 'Nothing, is "better".', 0.0, (0.0, 0.0), 0.001, True))


def test_it_is_read_as_it_was_written(comparison, tmp_path):
    assert Comparison.load(comparison.save(tmp_path / "new")) == comparison
    assert Comparison.load(tmp_path / "new" / "comparison.json") == comparison
    none = replace(comparison, recommendation=None)
    assert Comparison.load(none.save(tmp_path / "new")) == none


def test_records_are_flat_and_alike(comparison):
    records = comparison.records()
    assert len({tuple(record) for record in records}) == 1
    assert not any(isinstance(value, dict | list | tuple) for record in records for value in record.values())
    assert [record["label"] for record in records] == ["dense", "m-countdown at 0.5", "int4"]
    assert records[1]["loss_high"] == pytest.approx(0.11)
    assert records[1]["tokens_per_s"] is None
    assert records[2]["error"] == "no kernel"


def test_the_table_has_a_row_a_cell(comparison, tmp_path):
    comparison.save(tmp_path)
    with (tmp_path / "comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["dense", "m-countdown at 0.5", "int4"]
    assert float(rows[0]["speedup"]) == 1.0
    assert rows[2]["perplexity"] == ""


def test_a_cell_by_its_label(comparison):
    assert comparison.cell("int4").kind == "quantised"
    with pytest.raises(ConfigError, match="no cell is called 'int3'; there are: dense, "):
        comparison.cell("int3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found | {"version": 99}, "version is 99, this countdown reads up to 4: upgrade"),
        (lambda found: found | {"format": "other"}, "format is 'other'"),
        (lambda found: found | {"colour": "red"}, "no field 'colour'"),
        (lambda found: found | {"cells": [{"label": "x"}]}, "TypeError"),
        (lambda found: found | {"cells": None}, "TypeError"),
        (lambda found: {"meta": {}, "records": []}, "KeyError: 'format'"),
        (lambda found: [found], "TypeError"),
    ],
)
def test_what_is_no_comparison_is_refused_in_a_line(comparison, tmp_path, change, message):
    file = comparison.save(tmp_path) / "comparison.json"
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        Comparison.load(tmp_path)
    assert str(file) in str(caught.value)


def test_what_is_cut_off_or_missing_is_refused(comparison, tmp_path):
    with pytest.raises(ConfigError, match="does not exist; make it with: countdown compare"):
        Comparison.load(tmp_path)
    file = comparison.save(tmp_path) / "comparison.json"
    file.write_text(file.read_text(encoding="utf-8")[:200], encoding="utf-8")
    again = f"countdown compare MODEL -o {re.escape(str(tmp_path))} --overwrite"
    with pytest.raises(ConfigError, match=rf"is damaged, .*JSONDecodeError.*; make it again, .*: {again}$"):
        Comparison.load(tmp_path)


def test_others_are_not_mixed_in(comparison, tmp_path):
    check_same(comparison, META["identity"], tmp_path)
    with pytest.raises(ConfigError, match=r"other versions \(torch 2.13, not torch 2.14\).*overwrite=True\.$"):
        check_same(comparison, META["identity"] | {"versions": {"torch": "2.14"}}, tmp_path)
    with pytest.raises(ConfigError, match=r"other model \(tiny, not large\)"):
        check_same(comparison, META["identity"] | {"model": "large"}, tmp_path)


def test_what_was_saved_under_an_older_name_is_read(comparison, tmp_path):
    document = comparison.document()
    for cell in document["cells"]:
        cell["ffn_weights_read"] = cell.pop("site_weights_read")
        del cell["tasks"]
    (tmp_path / "comparison.json").write_text(json.dumps(document | {"version": 1}))
    assert Comparison.load(tmp_path) == comparison
