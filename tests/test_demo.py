"""The demo, as far as it goes without its model."""

from __future__ import annotations

from countdown import demo
from countdown.comparison.comparison import Cell


def test_it_is_quick_and_shows_what_it_finds_as_it_comes(monkeypatch, tmp_path):
    asked, shown = {}, []

    def compare(model, *, on_cell, **settings):
        asked.update(settings)
        on_cell(Cell("dense", "dense", {}, None))

    monkeypatch.setattr(demo, "find_model", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "compare", compare)
    demo.run_demo(tmp_path / "out", on_cell=shown.append)
    assert asked["quick"]
    assert [cell.label for cell in shown] == ["dense"]
