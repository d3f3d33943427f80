"""Which backend the environment asks for."""

from __future__ import annotations

import os

from countdown.errors import ConfigError

REFERENCE = "reference"
VARIABLE = "COUNTDOWN_BACKEND"
# The reference, and what `ops.backends` registers.
KNOWN = [REFERENCE]


def requested() -> str | None:
    """Return the backend named by `COUNTDOWN_BACKEND`, None for the best there is.

    Raises:
        ConfigError: There is none of this name.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted and wanted not in KNOWN:
        raise ConfigError(f"{VARIABLE} is '{wanted}', but this countdown has only: {', '.join(KNOWN)}.")
    return wanted or None
