"""Which methods there are: the files of this folder, and what installed packages add.

A package adds a method by an entry point in the group `countdown.methods` that names its class.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

import countdown.methods
from countdown.config import check_fields, suggestion
from countdown.errors import ConfigError
from countdown.methods._base import Method
from countdown.ops.indicators import PROXY, Indicator, register_indicator

_METHODS: dict[str, type[Method]] = {}
_BROKEN: dict[str, Exception] = {}  # entry points that failed to load, by name
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method available to the API and the command line under its name.

    Raises:
        ConfigError: The name or an alias is taken, or the class lacks what a method needs.
    """
    for attribute in ("name", "summary", "source", "unseen"):
        if not hasattr(cls, attribute):
            raise ConfigError(f"method class {cls.__name__} sets no '{attribute}'.")
    if not isinstance(getattr(cls, "indicator", None), Indicator):
        raise ConfigError(f"method class {cls.__name__} sets no 'indicator' of type Indicator.")
    if (cls.indicator is PROXY) != (cls.proxy_bits is not Method.proxy_bits):
        raise ConfigError(f"method class {cls.__name__}: the indicator 'proxy' and proxy_bits go together.")
    for name in (cls.name, *cls.aliases):
        if _METHODS.get(name, cls) is not cls:
            raise ConfigError(f"a method named '{name}' is registered already; choose another name.")
    register_indicator(cls.indicator)
    _METHODS.update(dict.fromkeys((cls.name, *cls.aliases), cls))
    return cls


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(countdown.methods.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"countdown.methods.{module.name}")
    for entry in entry_points(group="countdown.methods"):
        try:
            register(entry.load())
        except Exception as error:  # one broken package must not take the others down
            _BROKEN[entry.name] = error


def method_names() -> list[str]:
    """Return the names of all methods, aliases left out."""
    _discover()
    return [name for name, cls in _METHODS.items() if cls.name == name]


def method_class(name: str) -> type[Method]:
    """Return the class of the method with this name or alias.

    Raises:
        ConfigError: There is none.
    """
    _discover()
    if name in _BROKEN:
        error = _BROKEN[name]
        raise ConfigError(f"method '{name}' of an installed package cannot be loaded: {type(error).__name__}: {error}")
    if name not in _METHODS:
        raise ConfigError(f"method is '{name}', expected one of: {', '.join(_METHODS)}.{suggestion(name, _METHODS)}")
    return _METHODS[name]


def method(name: str, **settings: Any) -> Method:
    """Return a method with its settings, e.g. `method("m-countdown", sparsity=0.7, weighting="rms")`.

    Args:
        name: One of `method_names()`, or an alias (`chess` is `cats` with weighting `rms`).
        **settings: Fields of the method; see `Method`.

    Raises:
        ConfigError: The method or a field is unknown, or a value is out of range.
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
