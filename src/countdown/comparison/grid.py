"""What is compared: configurations of methods and sparsities, dense, and quantised dense; and what is wished for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from countdown.comparison import quantised
from countdown.comparison.comparison import Cell
from countdown.comparison.effort import USUAL, Effort
from countdown.errors import ConfigError
from countdown.evaluation.choice import PREDICTING, can_predict, candidates, first_level
from countdown.methods import COMBINED_RECIPE, DEFAULT_METHOD, Method, method, method_class
from countdown.profiles.recipe import SUFFIXES, Recipe

# What profiles are calibrated at; they serve every sparsity.
CALIBRATED_AT = 0.5


@dataclass(frozen=True)
class Configuration:
    """One way to run a model.

    Args:
        label, kind, sparsity: See `Cell`.
        recipe: Of a sparse one, at its sparsity.
        scheme: Of a quantised one, see `quantised.schemes`.
    """

    label: str
    kind: str
    sparsity: float | None = None
    recipe: Recipe | None = None
    scheme: str | None = None

    @classmethod
    def of_cell(cls, cell: Cell) -> Configuration:
        """Return what a cell was measured of.

        Raises:
            ConfigError: It names a method, or settings, that do not exist here.
        """
        recipe = Recipe.of_record(cell.settings) if cell.kind == "sparse" else None
        return cls(cell.label, cell.kind, cell.sparsity, recipe, cell.settings.get("quantised"))

    def settings(self, device: torch.device) -> dict[str, Any]:
        """Return what makes it, see `Cell`."""
        if self.scheme is not None:
            return quantised.settings(self.scheme, device)
        return self.recipe.record() if self.recipe else {}

    @property
    def name(self) -> str:
        """What it is at any sparsity."""
        return self.label if self.sparsity is None else self.label.removesuffix(f" at {self.sparsity:g}")

    @property
    def kinds(self) -> list[str]:
        """The kinds of sites whose share of weights read is shown: those that it makes sparse."""
        return [method_class(DEFAULT_METHOD).kind] if self.recipe is None else self.recipe.kinds


DENSE = Configuration("dense", "dense")


@dataclass(frozen=True)
class Wish:
    """What a recommendation must fulfil; without either, it is the best trade.

    Args:
        max_loss: The largest rise of perplexity, 0.02 for 2%.
        min_speedup: The least speed, as a multiple of the dense model's.

    Raises:
        ConfigError: A value that cannot be wished for.
    """

    max_loss: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.max_loss is not None and not self.max_loss > 0:
            raise ConfigError(
                f"the largest loss is {self.max_loss}, expected more than 0 (0.02 lets perplexity rise by 2%)."
            )
        if self.min_speedup is not None and not self.min_speedup > 1:
            raise ConfigError(
                f"the least speed-up is {self.min_speedup}, expected more than 1 (1.5: half as fast again as dense)."
            )

    def __str__(self) -> str:
        loss = f"perplexity rises by at most {self.max_loss:.1%}" if self.max_loss is not None else ""
        speed = f"at least {self.min_speedup:g} times as fast as dense" if self.min_speedup is not None else ""
        return " and ".join(filter(None, [loss, speed])) or "the best trade of speed against perplexity"


def configurations(
    methods: Sequence[str | Method | Recipe] | None, sparsities: Sequence[float] | None, effort: Effort = USUAL
) -> list[Configuration]:
    """Return the sparse configurations: every method at every sparsity.

    Args:
        methods: Methods, recipes, or names as the command line takes them: a method, a method with settings
            (`NAME:weighting=rms,bits=3`), or a recipe file. Without any, the usual ones; see `usual_methods`.
        sparsities: Shares to skip; they replace those of recipes. [those of `effort`]
        effort: What is compared where nothing else is asked for.

    Raises:
        ConfigError: An unknown method or setting, a sparsity out of range, or one of them twice.
    """
    recipes = _labelled(usual_methods(effort) if methods is None else methods)
    for label, recipe in recipes:
        if any(entry.method.selector.from_prompt for entry in recipe.entries):
            raise ConfigError(
                f"{label} chooses from prompts, and here every token is sparse; to judge it, evaluate it with "
                "--prompt-tokens."
            )
    found = [
        Configuration(f"{label} at {sparsity:g}", "sparse", sparsity, recipe.with_settings(sparsity=sparsity))
        for label, recipe in recipes
        for sparsity in (effort.sparsities if sparsities is None else sparsities)
        if sparsities is not None or sparsity >= first_level(recipe)
    ]
    labels = [configuration.label for configuration in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"{twice[0]} is asked for twice.")
    return found


def usual_methods(effort: Effort = USUAL) -> list[Method | Recipe]:
    """Return what is compared: methods that could be picked, weighted and looking as most do best; if much is measured,
    also as published, with what they drop predicted, and FFNs and attention on one budget.
    """
    weighted = candidates()
    if not effort.published:
        return [*weighted]
    published = [method(one.name, decision=one.decision) for one in weighted if one.weighting != "none"]
    predicting = [Recipe.of(one).with_settings(**PREDICTING) for one in weighted if can_predict(one)]
    return [*weighted, *published, *predicting, Recipe.named(COMBINED_RECIPE)]


def _labelled(methods: Sequence[str | Method | Recipe]) -> list[tuple[str, Recipe]]:
    if not methods:
        raise ConfigError("there is no method to compare; give one, or none at all for the usual ones.")
    return [_named(one) if isinstance(one, str) else (_label(Recipe.of(one)), Recipe.of(one)) for one in methods]


def _named(name: str) -> tuple[str, Recipe]:
    """Return the label and recipe that a name on the command line stands for."""
    recipe = Recipe.parse(name)
    if Path(name).suffix in SUFFIXES:
        return Path(name).stem, recipe
    if "sparsity=" in name:
        raise ConfigError(f"'{name}' sets a sparsity; give --sparsity, which all methods share.")
    return _label(recipe), recipe


def _label(recipe: Recipe) -> str:
    """Return a short name for what a recipe does at any sparsity."""
    labels = recipe.labels()
    parts = []
    for entry, name in zip(recipe.entries, labels, strict=False):
        label = name + ("" if entry.method.decision == "threshold" else f", {entry.method.decision}")
        parts.append(label if entry.pattern == "*" else f"{entry.pattern}: {label}")
    return "; ".join([*parts, *labels[len(parts) :]])
