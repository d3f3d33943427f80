"""Recipes: which method applies to which modules, and a readable file of it.

    - pattern: "*.mlp"
      method: m-countdown
      weighting: rms
      sparsity: 0.7
    - pattern: "*.self_attn.*"
      method: teal
      sparsity: 0.4

An entry takes the sites of its method's kind whose names match. A site belongs to the first entry that takes it or
the FFN around it.

Entries that have one budget stand in a mapping, which has the sparsity:

    allocation: global
    sparsity: 0.5
    entries:
      - method: d-proxy
      - method: wina
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from countdown.allocation import ALLOCATIONS
from countdown.config import check_fields
from countdown.errors import ConfigError
from countdown.files import reason, write_text
from countdown.methods import Method, NamedRecipe, method, method_class, named, parse_method

SUFFIXES = (".yaml", ".yml", ".json")
# Settings that only some methods have, and that others of a recipe let pass.
SOME_HAVE = ("compensate", "ridge", "second_look")
# What is said once of entries that have one budget.
_BUDGET = ("allocation", "sparsity")
_EXAMPLES = {"YAML": "- {pattern: '*.mlp', method: cats}", "JSON": '[{"pattern": "*.mlp", "method": "cats"}]'}


@dataclass(frozen=True)
class RecipeEntry:
    """A method and the modules it applies to.

    Args:
        method: The method with its settings.
        pattern: Shell-style pattern of module names, e.g. `*.mlp`; `*` for every site of the method's kind.
    """

    method: Method
    pattern: str = "*"


@dataclass(frozen=True)
class Recipe:
    """What to calibrate: methods by module pattern.

    Args:
        entries: In order; the first that takes a site has it.
        allocation: Of one budget for all entries, whose methods then have one sparsity: what is read are the bytes
            that would be if every module had it. None where each entry has its own, as one alone has.

    Raises:
        ConfigError: No entries, an allocation that does not divide a budget among several, or entries that differ in
            sparsity or allocation though they have one budget.
    """

    entries: tuple[RecipeEntry, ...]
    allocation: str | None = None

    def __post_init__(self) -> None:
        """Check that there is something to calibrate, and that the entries of one budget have one."""
        if not self.entries:
            raise ConfigError("the recipe has no entries.")
        if self.allocation is None:
            return
        if not ALLOCATIONS.get(self.allocation).across:
            able = ", ".join(one.name for one in ALLOCATIONS if one.across)
            raise ConfigError(
                f"allocation '{self.allocation}' is for single entries; one budget for all takes: {able}."
            )
        own = {(entry.method.allocation, entry.method.sparsity) for entry in self.entries}
        if own != {(self.allocation, self.entries[0].method.sparsity)}:
            raise ConfigError("entries of one budget have one sparsity, and the recipe's allocation.")
        if len(self.entries) == 1:
            object.__setattr__(self, "allocation", None)

    @classmethod
    def of(cls, config: Method | Recipe) -> Recipe:
        """Return a method as a recipe of one entry; a recipe as it is.

        Raises:
            ConfigError: It is neither.
        """
        if isinstance(config, Recipe):
            return config
        if not isinstance(config, Method):
            raise ConfigError(f"config is {config!r}, expected countdown.method(...) or a countdown.Recipe.")
        return cls((RecipeEntry(config),))

    @classmethod
    def named(cls, name: str, **settings: Any) -> Recipe:
        """Return the recipe of this name, or a method's of one entry, with its settings, such as `sparsity`.

        Raises:
            ConfigError: Nothing has this name, a method of it does not have a setting, or not this value, or the recipe
                has another of its own.
        """
        found = named(name)
        if found is None:
            return cls.of(method(name, **settings))
        budget = {} if found.allocation is None else {"allocation": found.allocation}
        entries = [_entry(f"entry {place + 1} of {name}", {**one, **budget}) for place, one in enumerate(found.entries)]
        try:
            whole = cls(tuple(entry for some in entries for entry in some), found.allocation)
            return whole.with_settings(**_free(found, settings))
        except ConfigError as error:
            raise ConfigError(f"'{name}': {error}") from error

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Return what a name on the command line stands for.

        Args:
            text: A recipe file, or the name of a method or recipe, with settings if any: `NAME:weighting=rms,bits=3`.

        Raises:
            ConfigError: See `named` and `load`; what follows the name is no list of settings.
        """
        if Path(text).suffix in SUFFIXES:
            return cls.load(text)
        name, _, settings = text.partition(":")
        return cls.named(name, **_settings(name, settings))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML or JSON file.

        Raises:
            ConfigError: The file cannot be read, is not a list of entries, or an entry has an unknown field, an
                unknown method or a value out of range, or what belongs to the one budget of all.
        """
        content = _read(Path(os.path.expanduser(path)))
        budget: dict[str, Any] = {}
        if isinstance(content, dict) and "entries" in content:
            check_fields(f"recipe {path}", content, ["entries", *_BUDGET])
            budget = {"allocation": "global", **{field: content[field] for field in _BUDGET if field in content}}
            content = content["entries"]
        if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
            raise ConfigError(f"recipe {path} is not a list of entries such as: {_EXAMPLES['YAML']}")
        entries = [_entry(f"entry {index + 1} of {path}", entry, budget) for index, entry in enumerate(content)]
        return cls(tuple(entry for some in entries for entry in some), budget.get("allocation"))

    def save(self, path: str | Path) -> None:
        """Write the recipe as a YAML file, or a JSON file where the name ends so, that `load` reads.

        Raises:
            AccidentError: The file cannot be written.
        """
        import yaml

        path = Path(os.path.expanduser(path))
        entries = [self._written(entry) for entry in self.entries]
        budget = {"allocation": self.allocation, "sparsity": self.entries[0].method.sparsity, "entries": entries}
        content = entries if self.allocation is None else budget
        as_json = path.suffix == ".json"
        text = json.dumps(content, indent=2) + "\n" if as_json else yaml.safe_dump(content, sort_keys=False)
        write_text(path, text)

    def _written(self, entry: RecipeEntry) -> dict[str, Any]:
        shared = () if self.allocation is None else _BUDGET
        found = entry.method.to_dict()
        own = {field.name: found[field.name] for field in fields(entry.method) if field.name not in shared}
        return {"pattern": entry.pattern, "method": entry.method.name, **own}

    def with_settings(self, **settings: Any) -> Recipe:
        """Return the recipe with these settings in every method.

        Raises:
            ConfigError: A method does not have the setting, or not this value.
        """
        entries = tuple(
            replace(entry, method=replace(entry.method, **own_settings(entry.method, settings, self.entries)))
            for entry in self.entries
        )
        return Recipe(entries, self.allocation and settings.get("allocation", self.allocation))

    def record(self) -> dict[str, Any]:
        """Return the settings flat, as results files hold them; for several entries, as a list under `recipe`."""
        if len(self.entries) == 1:
            (entry,) = self.entries
            settings = entry.method.to_dict()
            pattern = {} if entry.pattern == "*" else {"pattern": entry.pattern}
            return {"method": settings.pop("name"), "indicator": entry.method.selector.indicator, **settings, **pattern}
        entries = [{"pattern": entry.pattern, **entry.method.to_dict()} for entry in self.entries]
        budget = {"sparsity": self.entries[0].method.sparsity, "allocation": self.allocation} if self.allocation else {}
        return {"method": "recipe", **budget, "recipe": entries}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Recipe:
        """Return the recipe that `record` described.

        Raises:
            ConfigError: It names a method, or settings, that do not exist here.
        """
        single = {"name": record["method"], **{k: v for k, v in record.items() if k not in ("method", "indicator")}}
        entries = [dict(entry) for entry in record.get("recipe", [single])]
        patterns = [entry.pop("pattern", "*") for entry in entries]
        allocation = record.get("allocation") if "recipe" in record else None
        return cls(tuple(RecipeEntry(parse_method(e), p) for e, p in zip(entries, patterns, strict=True)), allocation)

    @property
    def kinds(self) -> list[str]:
        """The kinds of sites that its methods apply to."""
        return list(dict.fromkeys(entry.method.kind for entry in self.entries))

    @property
    def reads_text(self) -> bool:
        """Whether calibration has anything to estimate from a text."""
        return any(entry.method.reads_text for entry in self.entries)

    @property
    def has_proxy(self) -> bool:
        """Whether a method decides by a copy of weights in few bits."""
        return any(entry.method.selector.indicator == "proxy" for entry in self.entries)

    @property
    def derives(self) -> bool:
        """Whether a method derives weights from the model's, to stand beside them."""
        return any(entry.method.derives for entry in self.entries)

    def __str__(self) -> str:
        return "; ".join(self.lines())

    def lines(self) -> list[str]:
        """Return a line for each entry."""
        if [entry.pattern for entry in self.entries] == ["*"]:
            return [str(self.entries[0].method)]
        if self.allocation is None:
            return [f"{entry.pattern}: {entry.method}" for entry in self.entries]
        parts = zip(self.entries, self.labels(), strict=False)
        lines = [f"{entry.pattern}: {label}, {entry.method.decision}" for entry, label in parts]
        return [*lines, f"{self.labels()[-1]}, at {self.entries[0].method.sparsity:g}"]

    def labels(self) -> list[str]:
        """Return what each entry's method is called, and last what divides their budget, if they have one."""
        if self.allocation is None:
            return [entry.method.label for entry in self.entries]
        plain = [replace(entry.method, allocation="uniform").label for entry in self.entries]
        return [*plain, f"one budget, {self.allocation}"]


def recipe(name: str, **settings: Any) -> Recipe:
    """Return the recipe of this name, or a method's of one entry, e.g. `recipe("chess", sparsity=0.5)`.

    Args:
        name: A named recipe or a method.
        **settings: Fields of all its methods, such as `sparsity`.

    Raises:
        ConfigError: See `Recipe.named`.
    """
    return Recipe.named(name, **settings)


def match(entries: Sequence[tuple[str, str]], sites: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return which entry each site belongs to, by name; sites that none takes are left out.

    Args:
        entries: (pattern, kind) of each.
        sites: (name, kind) of each.

    Raises:
        ConfigError: An entry takes a module inside of which an earlier one took another, or takes none.
    """
    sites = list(sites)
    taken: dict[str, int] = {}
    for index, (pattern, kind) in enumerate(entries):
        names = [name for name, its_kind in sites if its_kind == kind and fnmatchcase(name, pattern)]
        free = [name for name in names if not _inside_taken(name, taken)]
        for name in free:
            part = next((other for other in taken if other.startswith(f"{name}.")), None)
            if part is not None:
                raise ConfigError(
                    f"'{pattern}' takes {name}, but an earlier entry took its part {part}; put the entry for the "
                    "whole first, or narrow the pattern of the other."
                )
        if not free:
            raise ConfigError(f"pattern '{pattern}' takes no module of the model: {_available(sites, kind, names)}.")
        taken.update(dict.fromkeys(free, index))
    return taken


def _inside_taken(name: str, taken: Mapping[str, int]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in taken)


def _available(sites: Sequence[tuple[str, str]], kind: str, matched: Sequence[str]) -> str:
    if matched:
        return "earlier entries took all that it matches"
    names = [name for name, its_kind in sites if its_kind == kind]
    return f"its method applies to {names[0]}, …, {names[-1]}" if names else f"it has none of kind '{kind}'"


def _settings(name: str, text: str) -> dict[str, Any]:
    """Return the settings in `weighting=rms,bits=3`."""
    import yaml

    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(setting and equals and value for setting, equals, value in pairs):
        raise ConfigError(f"'{text}' of {name} is not a list of settings such as weighting=rms,allocation=global.")
    try:
        return {setting: yaml.safe_load(value) for setting, _, value in pairs}
    except yaml.YAMLError as error:
        raise ConfigError(f"'{text}' of {name} has a value that is neither a number nor a word.") from error


def _read(path: Path) -> Any:
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not text in UTF-8.") from error
    language, parse = ("JSON", json.loads) if path.suffix == ".json" else ("YAML", yaml.safe_load)
    try:
        return parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"recipe {path} is not {language}{_near(error)}; expected a list of entries such as: {_EXAMPLES[language]}"
        ) from error


def _near(error: Exception) -> str:
    """Return where a parser stumbled, as far as it says: what it says else is about its own workings."""
    if isinstance(error, json.JSONDecodeError):
        return f", near line {error.lineno}"
    mark = getattr(error, "problem_mark", None)  # of YAML, counted from 0
    return "" if mark is None else f", near line {mark.line + 1}"


def _free(found: NamedRecipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a named recipe leaves open. Those it has of its own belong to single entries of it.

    Raises:
        ConfigError: One differs from the recipe's own.
    """
    for entry in found.entries:
        for field in settings.keys() & entry.keys():
            if settings[field] != entry[field]:
                raise ConfigError(
                    f"{field} is '{entry[field]}' in this recipe, not '{settings[field]}'; for another, write a recipe "
                    "file."
                )
    return {field: value for field, value in settings.items() if not any(field in entry for entry in found.entries)}


def _entry(what: str, given: Mapping[str, Any], budget: Mapping[str, Any] | None = None) -> list[RecipeEntry]:
    """Return the entry that a mapping describes; those of a named recipe in its place.

    Args:
        what: What it is called.
        given: The mapping.
        budget: Settings of the one budget that it has with others, none where it has its own.
    """
    if own := [field for field in _BUDGET if budget and field in given]:
        raise ConfigError(f"{what} has {own[0]} of its own, and all entries have one budget: leave it out.")
    given = {**given, **(budget or {})}
    name, pattern = given.get("method"), given.get("pattern", "*")
    if not isinstance(name, str):
        check_fields(what, given, ["pattern", "method", *(field.name for field in fields(Method))])
        raise ConfigError(f"{what} names no method.")
    if not isinstance(pattern, str):
        raise ConfigError(f"the pattern of {what} is {pattern!r}, expected text such as '*.mlp'.")
    settings = {field: value for field, value in given.items() if field not in ("pattern", "method")}
    if found := named(name):
        if found.allocation is not None:
            raise ConfigError(f"{what} is '{name}', whose entries have a budget of their own: name it by itself.")
        if pattern != "*":
            raise ConfigError(f"{what} is '{name}', which has patterns of its own: leave out '{pattern}'.")
        try:
            return list(Recipe.named(name, **settings).entries)
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}") from error
    check_fields(what, given, ["pattern", "method", *(field.name for field in fields(method_class(name)))])
    return [RecipeEntry(method(name, **settings), pattern)]


def own_settings(method: Method, settings: Mapping[str, Any], entries: Sequence[Any]) -> dict[str, Any]:
    """Return the settings that are for one of several methods: all, but what only some of them have to offer.

    Args:
        method: It.
        settings: By name.
        entries: Those of a recipe or profile, each with its `method`.

    Raises:
        ConfigError: The method does not have one of them.
    """
    some = {name for name in SOME_HAVE if any(entry.method.has(name) for entry in entries)}
    own = {name: value for name, value in settings.items() if name not in some or method.has(name)}
    check_fields(f"method '{method.name}'", own, [field.name for field in fields(method)])
    return own
