"""Which configurations are shown, and what the front is."""

from __future__ import annotations

import pytest

from countdown.comparison.comparison import Cell, Layer, Quality
from countdown.comparison.series import all_series
from countdown.report.selection import MOST_LINES, by_block, by_layer, front
from report.sample import sample


def cell(name: str, sparsity: float, loss: float = 0.1) -> Cell:
    layers = [Layer("layers.0.mlp", sparsity, sparsity)]
    quality = Quality(10, 40.0, loss, (0.0, 1.0), 0.1, 0.9, sparsity, layers)
    return Cell(
        f"{name} at {sparsity:g}",
        "sparse",
        {"method": name, "sparsity": sparsity},
        sparsity,
        quality=quality,
    )


@pytest.mark.parametrize(("sparsities", "nearest"), [((0.3, 0.6, 0.9), 0.6), ((0.1, 0.45), 0.45), ((0.9,), 0.9)])
def test_layers_are_shown_at_the_sparsity_nearest_half(sparsities, nearest):
    (shown,) = by_layer(all_series([cell("one", sparsity) for sparsity in sparsities]))
    assert shown.cell.sparsity == nearest


def test_of_too_many_methods_those_that_lose_least_are_shown_in_their_order():
    cells = [cell(f"m{place}", 0.5, loss=1 - place / 10) for place in range(MOST_LINES + 2)]
    assert [one.series.name for one in by_layer(all_series(cells))] == [f"m{p}" for p in range(2, MOST_LINES + 2)]


def test_a_series_without_layers_is_not_shown():
    cells = [cell for cell in sample().cells if cell.kind != "sparse"]
    assert by_layer(all_series(cells)) == []


def test_the_front_is_what_no_other_beats():
    points = [(1.0, 0.0), (1.2, 0.1), (1.1, 0.2), (1.5, 0.05), (2.0, 0.3), (2.0, 0.4)]
    assert front(points) == [0, 3, 4]


def test_modules_of_a_block_are_averaged():
    layers = [Layer(f"model.layers.{block}.{part}", 0.5, 0.5) for block in (10, 2) for part in ("q_proj", "o_proj")]
    assert by_block(layers, [0.1, 0.3, 0.5, 0.7]) == {2: pytest.approx(0.6), 10: pytest.approx(0.2)}


def test_modules_without_a_number_stand_at_their_place():
    assert by_block([Layer("first", 0.5, 0.5), Layer("second", 0.5, 0.5)], [0.1, 0.2]) == {0: 0.1, 1: 0.2}
