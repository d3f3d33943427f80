"""The Hugging Face hub: whether it can be reached, asked once and quickly, and what lies in its cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from countdown.errors import told

# Seconds that connecting, and the answer, may take. Who raises the hub's own timeout for a slow network raises this.
_TIMEOUT = 5.0


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set: only the cache is used then."""
    from huggingface_hub import is_offline_mode

    found: bool = is_offline_mode()
    return found


def unreached() -> str | None:
    """Return why the hub cannot be reached, None if it answers, whatever it answers.

    Asked before anything is fetched, as the hub's own client tries again for half a minute, file by file.
    """
    from huggingface_hub import constants, get_session

    timeout = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _TIMEOUT)
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # whatever the client of this version raises
        return f"the hub, {constants.ENDPOINT}, could not be reached ({told(error)})"
    return None


@contextmanager
def left_alone() -> Iterator[None]:
    """Within the context nobody asks the hub, as if HF_HUB_OFFLINE were set.

    `local_files_only` is not enough: transformers does not hand it on to all that it asks for.
    """
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_known(name: str, file: str, revision: str | None) -> bool:
    """Return whether the cache has a file of a model, or knows that the model has none of this name."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return try_to_load_from_cache(name, file, revision=revision) is not None
    except ValueError:  # the hub gives nothing such a name
        return False


def lacks(error: BaseException | None) -> bool:
    """Return whether what was raised comes of a file that was looked for in the cache alone, and is not there."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False
