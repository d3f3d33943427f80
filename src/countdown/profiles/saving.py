"""Saving a sparsified model: ordinary dense weights, and the profile in a subfolder beside them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from countdown import hub
from countdown.errors import ConfigError, ProfileError
from countdown.loading import Source, explained
from countdown.profiles.profile import DERIVED, FILES, Profile, check_free

SUBFOLDER = "countdown"
_PROFILE = "_countdown_profile"


def keep_profile(model: nn.Module, profile: Profile) -> None:
    """Make `model.save_pretrained` write the profile as well, and `model.push_to_hub`, which would not, refuse."""
    vars(model)[_PROFILE] = profile
    # On the instance, as a partial: a deepcopy of the model then saves the copy.
    vars(model)["save_pretrained"] = partial(_save_pretrained, model)
    vars(model)["push_to_hub"] = _push_to_hub


def forget_profile(model: nn.Module) -> None:
    """Undo `keep_profile`."""
    for name in (_PROFILE, "save_pretrained", "push_to_hub"):
        vars(model).pop(name, None)


def own_profile(source: Source) -> Profile | None:
    """Return the profile in the model's subfolder `countdown`, on disk or on the hub; None if it has none.

    Raises:
        ProfileError: It is damaged, or not whole.
        ConfigError: Nothing can be loaded under this name.
    """
    if source.gguf_file:
        return None
    if os.path.isdir(source.name):
        folder = Path(source.name) / SUBFOLDER
        return Profile.load(folder) if (folder / FILES[0]).is_file() else None
    paths = [path for name in FILES if (path := _from_hub(source, f"{SUBFOLDER}/{name}")) is not None]
    if not paths:
        return None
    if len(paths) < len(FILES):
        raise ProfileError(f"the profile of {source.name} is not whole: it has only {Path(paths[0]).name}.")
    _from_hub(source, f"{SUBFOLDER}/{DERIVED}")
    return Profile.load(Path(paths[0]).parent)


def _from_hub(source: Source, name: str) -> str | None:
    """Return where a file of the model lies once fetched, None if the model has none."""
    from transformers.utils.hub import cached_file

    # A failing network must not make a model dense; offline on purpose, what is not in the cache is not there.
    if source.cached_only and not hub.is_known(source.name, name, source.revision):
        raise ConfigError(
            f"whether {source.name} has a profile is not known: the hub could not be reached. Set HF_HUB_OFFLINE=1 to "
            "use only what is cached."
        )
    flags = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": not hub.offline(),
    }
    with explained(source):
        path: str | None = cached_file(source.name, name, revision=source.revision, **flags)
    return path


def _push_to_hub(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "push_to_hub would upload the dense model without its profile; save to a folder and upload that: "
        "hf upload NAME FOLDER"
    )


def _save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    save: Callable[..., None] = type(model).save_pretrained  # type: ignore[attr-defined]
    bound = inspect.signature(save).bind(model, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given.get("push_to_hub"):
        _push_to_hub()
    folder = Path(given["save_directory"]) / SUBFOLDER
    main = given.get("is_main_process", True)
    if main:
        try:
            check_free(folder, overwrite=True)
        except ProfileError as error:
            raise ConfigError(f"the profile cannot be saved beside the model: {error}") from error
    save(model, *args, **kwargs)
    if main:
        vars(model)[_PROFILE].save(folder, overwrite=True)
