"""What can be added to: names and what stands behind them, from this package's own files and from installed packages.

An installed package adds by an entry point in the registry's group, which names what it adds.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Generic, TypeVar

from countdown.config import suggestion
from countdown.errors import ConfigError

T = TypeVar("T")
E = TypeVar("E")


class Registry(Generic[T]):
    """A list of things by name.

    Args:
        what: What they are, in the singular, as messages say it.
        package: The package whose modules each register something when imported; those that begin with `_` do not.
            Also the group of entry points by which installed packages add.
        name: Returns the name of an entry. [its `name`]
        check: Raises ConfigError for what is no such thing.
    """

    def __init__(
        self,
        what: str,
        package: str,
        *,
        name: Callable[[T], str] = attrgetter("name"),
        check: Callable[[T], object] = lambda _: None,
    ) -> None:
        self._what, self._package, self._name, self._check = what, package, name, check
        self._entries: dict[str, T] = {}
        self.broken: dict[str, Exception] = {}  # entry points that failed to load, by name
        self._complete = False

    def register(self, entry: E) -> E:
        """Make an entry known under its name, and return it; also as a class decorator.

        Raises:
            ConfigError: Another has this name, or it is no such thing.
        """
        self._check(entry)  # type: ignore[arg-type]
        self.add(self._name(entry), entry)  # type: ignore[arg-type]
        return entry

    def add(self, name: str, entry: T) -> None:
        """Make an entry known under a name. Adding an equal one again changes nothing.

        Raises:
            ConfigError: Another has this name.
        """
        if self._entries.setdefault(name, entry) != entry:
            article = "an" if self._what[0] in "aeiou" else "a"
            raise ConfigError(f"{article} {self._what} named '{name}' is registered already; choose another name.")

    def get(self, name: str) -> T:
        """Return what has this name.

        Raises:
            ConfigError: Nothing has, or the package that adds it cannot be loaded.
        """
        found = self._entries.get(name)
        if found is not None:
            return found
        self.discover()
        if name in self.broken:
            error = self.broken[name]
            raise ConfigError(
                f"{self._what} '{name}' of an installed package cannot be loaded: {type(error).__name__}: {error}"
            )
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise ConfigError(f"{self._what} is '{name}', expected one of: {known}.{suggestion(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all names, this package's own first."""
        self.discover()
        return list(self._entries)

    def __iter__(self) -> Iterator[T]:
        self.discover()
        return iter(self._entries.values())

    def discover(self) -> None:
        """Import what registers itself, once."""
        if self._complete:
            return
        self._complete = True
        for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self._package}.{module.name}")
        for entry in entry_points(group=self._package):
            try:
                self.register(entry.load())
            except Exception as error:  # one broken package must not take the others down
                self.broken[entry.name] = error


def instances_of(cls: type) -> Callable[[object], None]:
    """Return a check that an entry is an instance of a class, for `Registry`."""

    def check(entry: object) -> None:
        if not isinstance(entry, cls):
            raise ConfigError(f"{entry!r} is no {cls.__name__}; register an instance, such as {cls.__name__}(...).")

    return check


def classes_of(cls: type) -> Callable[[object], None]:
    """Return a check that an entry is a class derived from another, for `Registry`."""

    def check(entry: object) -> None:
        if not (isinstance(entry, type) and issubclass(entry, cls)):
            raise ConfigError(f"{entry!r} is no class derived from {cls.__name__}.")

    return check
