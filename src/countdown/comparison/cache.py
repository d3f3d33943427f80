"""What was measured before, by content: a small JSON file for each measured part of a cell, and profiles.

Keys are everything that a number depends on, so nothing has to be told when it changes: another key is another file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from countdown.errors import ConfigError, ProfileError
from countdown.files import unwritable, write_text
from countdown.profiles.profile import Profile

VARIABLE = "COUNTDOWN_CACHE"
# Of what is stored under a key: another countdown may measure other things by the same name.
FORMAT = 2
Key = Mapping[str, Any]
T = TypeVar("T")


def default_folder() -> Path:
    """Return `$COUNTDOWN_CACHE`, or the platform's folder for caches."""
    from platformdirs import user_cache_path

    given = os.environ.get(VARIABLE)
    return Path(os.path.expanduser(given)) if given else user_cache_path("countdown-llm", appauthor=False)


@dataclass(frozen=True)
class Cache:
    """Measurements on disk.

    Args:
        folder: Where.
        fresh: Find nothing, so that all is measured again, and kept in place of what was there.
    """

    folder: Path
    fresh: bool = False

    def check(self) -> None:
        """Raise ConfigError if nothing can be written."""
        if problem := unwritable(self.folder / "x"):
            raise ConfigError(f"the cache cannot be used: {problem} Set {VARIABLE} to a folder of yours.")

    def get(self, key: Key, parse: Callable[[Any], T]) -> T | None:
        """Return what is stored under a key; None where nothing is, or what cannot be read."""
        if self.fresh:
            return None
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            return parse(found["value"]) if found["key"] == _plain(key) else None
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
            return None  # measured again, and written over

    def put(self, key: Key, value: Any) -> None:
        """Store a value, as JSON can hold it, under a key.

        Raises:
            AccidentError: It cannot be written.
        """
        write_text(self._path(key), json.dumps({"key": _plain(key), "value": value}, indent=1) + "\n")

    def get_profile(self, key: Key) -> Profile | None:
        """Return the profile that is stored under a key; None where none is, or it is damaged."""
        if self.fresh:
            return None
        try:
            return Profile.load(self._folder(key))
        except (ProfileError, ConfigError):
            return None

    def put_profile(self, key: Key, profile: Profile) -> None:
        """Store a profile under a key.

        Raises:
            AccidentError: It cannot be written.
        """
        profile.put(self._folder(key))

    def _path(self, key: Key) -> Path:
        return self.folder / "cells" / f"{_hash(key)}.json"

    def _folder(self, key: Key) -> Path:
        return self.folder / "profiles" / _hash(key)


def _plain(key: Key) -> Any:
    """Return a key as JSON gives it back."""
    return json.loads(json.dumps({"format": FORMAT, **key}))


def _hash(key: Key) -> str:
    return hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:32]
