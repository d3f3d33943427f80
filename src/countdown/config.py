"""What every configuration shares: checked choices and fields, with the nearest name in the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from countdown.errors import ConfigError

# How many tokens calibration reads unless told otherwise.
CALIBRATION_TOKENS = 32768


def suggestion(name: str, options: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` when one of `options` is close to `name`, else an empty string."""
    close = difflib.get_close_matches(str(name), list(options), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_choice(what: str, value: str, options: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `options`."""
    options = list(options)
    if value not in options:
        raise ConfigError(f"{what} is '{value}', expected one of: {', '.join(options)}.{suggestion(value, options)}")


def check_fields(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ConfigError for the first field of `given` that is not in `known`."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"{what} has no field '{name}'; it has: {', '.join(known)}.{suggestion(name, known)}")


def check_seed(seed: int) -> None:
    """Raise ConfigError unless torch takes this seed."""
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed is {seed}, expected 0 to {(1 << 63) - 1}.")
