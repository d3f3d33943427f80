"""Which methods and named recipes there are: the files of this folder, and what installed packages add.

A package adds a method by an entry point in the group `countdown.methods` that names its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from countdown.config import check_fields
from countdown.errors import ConfigError
from countdown.methods._base import Method
from countdown.registry import Registry
from countdown.selectors import SELECTORS, Selector


@dataclass(frozen=True)
class NamedRecipe:
    """Several methods under one name.

    Args:
        name, summary, source: As a method's.
        entries: As in a recipe file: `method`, `pattern` and settings.
        allocation: Of one budget for all entries, None where each has its own.
    """

    name: str
    summary: str
    source: str
    entries: tuple[Mapping[str, Any], ...]
    allocation: str | None = None


def _check(entry: type[Method] | NamedRecipe) -> None:
    """Raise ConfigError for a class that lacks what a method needs; make its selector and its aliases known."""
    if isinstance(entry, NamedRecipe):
        return
    for attribute in ("name", "summary", "source", "unseen"):
        if not hasattr(entry, attribute):
            raise ConfigError(f"method class {entry.__name__} sets no '{attribute}'.")
    if not isinstance(getattr(entry, "selector", None), Selector | property):
        raise ConfigError(f"method class {entry.__name__} sets no 'selector' of type Selector.")
    if isinstance(entry.selector, Selector):
        SELECTORS.register(entry.selector)
    for alias in entry.aliases:
        METHODS.add(alias, entry)


METHODS: Registry[type[Method] | NamedRecipe] = Registry("method", "countdown.methods", check=_check)
register = METHODS.register


def method_names() -> list[str]:
    """Return the names of all methods, aliases and recipes left out."""
    return [name for name in METHODS.names() if getattr(METHODS.get(name), "name", None) == name and not named(name)]


def named(name: str) -> NamedRecipe | None:
    """Return the recipe of this name, None if it is a method's.

    Raises:
        ConfigError: Nothing has this name.
    """
    found = METHODS.get(name)
    return found if isinstance(found, NamedRecipe) else None


def method_class(name: str) -> type[Method]:
    """Return the class of the method with this name or alias.

    Raises:
        ConfigError: There is none.
    """
    found = METHODS.get(name)
    if isinstance(found, NamedRecipe):
        several = ", ".join(dict.fromkeys(entry["method"] for entry in found.entries))
        raise ConfigError(
            f"'{name}' is a recipe of several methods ({several}), and here one is expected. In Python, "
            f"countdown.recipe('{name}') makes it."
        )
    return found


def method(name: str, **settings: Any) -> Method:
    """Return a method with its settings, e.g. `method("m-countdown", sparsity=0.7, weighting="rms")`.

    Args:
        name: One of `method_names()`, or an alias (`wina` is `teal` with weighting `shared-norm`).
        **settings: Fields of the method; see `Method`.

    Raises:
        ConfigError: The method or a field is unknown, or a value is out of range.

    Example:
        countdown.method("d-proxy", sparsity=0.7, bits=4)
    """
    cls = method_class(name)
    check_fields(f"method '{name}'", settings, [field.name for field in fields(cls)])
    fixed = cls.aliases.get(name, {})
    for field, value in fixed.items():
        if settings.get(field, value) != value:
            raise ConfigError(
                f"'{name}' is {cls.name} with {field} '{value}'; for {field} '{settings[field]}' use {cls.name}."
            )
    return cls(**{**settings, **fixed})


def parse_method(settings: Mapping[str, Any]) -> Method:
    """Return the method that `Method.to_dict` described.

    Raises:
        ConfigError: As `method`; also when the settings were written by a newer version of the method.
    """
    rest = dict(settings)
    name, version = rest.pop("name", None), rest.pop("version", 1)
    if not isinstance(name, str):
        raise ConfigError("a method's settings have no 'name'.")
    known = method_class(name).version
    if not isinstance(version, int) or version > known:
        raise ConfigError(f"method '{name}' has version {version}, this countdown knows up to {known}: upgrade it.")
    return method(name, **rest)
