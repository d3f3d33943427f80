"""Which configurations belong together."""

from __future__ import annotations

from countdown.comparison.comparison import Cell
from countdown.comparison.series import all_series


def cell(name: str, sparsity: float, **settings: object) -> Cell:
    made = {"method": name, "sparsity": sparsity} | settings
    return Cell(f"{name} at {sparsity:g}", "sparse", made, sparsity)


def test_series_differ_in_sparsity_alone():
    cells = [cell("one", 0.7), cell("two", 0.5), cell("one", 0.5), cell("one", 0.5, weighting="rms")]
    found = all_series(cells)
    assert [[c.sparsity for c in one.cells] for one in found] == [[0.5, 0.7], [0.5], [0.5]]
    assert [one.name for one in found] == ["one", "two", "one"]


def test_recipes_are_one_series_although_each_entry_has_a_sparsity():
    def entries(sparsity: float) -> list[dict[str, object]]:
        return [{"pattern": "*.mlp", "name": "one", "sparsity": sparsity}]

    cells = [cell("recipe", sparsity, recipe=entries(sparsity)) for sparsity in (0.3, 0.6)]
    assert len(all_series(cells)) == 1


def test_two_recipe_files_are_two_series_though_they_say_the_same():
    cells = [cell("a", 0.5, method="recipe"), cell("b", 0.5, method="recipe"), cell("b", 0.7, method="recipe")]
    assert [(one.name, len(one.cells)) for one in all_series(cells)] == [("a", 1), ("b", 2)]
