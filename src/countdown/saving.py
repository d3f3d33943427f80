"""Saving a sparsified model: ordinary dense weights, and the profile in a subfolder beside them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from countdown.errors import ConfigError, ProfileError
from countdown.models.loading import Source
from countdown.profile import FILES, Profile, check_free, swap

SUBFOLDER = "countdown"
_PROFILE = "_countdown_profile"


def base_model(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside a PEFT model; any other model as it is."""
    inner = getattr(model, "get_base_model", None)
    found: nn.Module = inner() if callable(inner) else model
    return found


def keep_profile(model: nn.Module, profile: Profile) -> None:
    """Make `model.save_pretrained` write the profile as well."""
    vars(model)[_PROFILE] = profile
    # On the instance, as a partial: a deepcopy of the model then saves the copy.
    vars(model)["save_pretrained"] = partial(_save_pretrained, model)


def forget_profile(model: nn.Module) -> None:
    """Undo `keep_profile`."""
    for name in (_PROFILE, "save_pretrained"):
        vars(model).pop(name, None)


def own_profile(source: Source) -> Profile | None:
    """Return the profile in the model's subfolder `countdown`, on disk or on the hub; None if it has none.

    Raises:
        ProfileError: It is damaged.
    """
    if source.gguf_file:
        return None
    if os.path.isdir(source.name):
        folder = Path(source.name) / SUBFOLDER
        return Profile.load(folder) if folder.is_dir() else None
    from transformers.utils.hub import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    paths = [cached_file(source.name, f"{SUBFOLDER}/{name}", revision=source.revision, **quiet) for name in FILES]
    return Profile.load(Path(paths[0]).parent) if all(paths) else None


def check_folder(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError unless a model may be exported to `path`."""
    if path.exists():
        if not overwrite:
            raise ConfigError(f"{path} exists already; give another path or --overwrite (overwrite=True).")
        if not (path / SUBFOLDER / FILES[0]).is_file():
            raise ConfigError(f"{path} is not a model that countdown exported, so it is not overwritten.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(f"{path} cannot be written: {parent} is not a folder that you may write to.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Within the context, a scratch folder to fill; afterwards it is `path`, or gone if something failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the final rename stays on one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        (scratch / "new").mkdir()
        yield scratch / "new"
        swap(scratch / "new", path, scratch / "old")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _save_pretrained(model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    if kwargs.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub would upload the dense model without its profile; save to a folder and upload that: "
            "hf upload NAME FOLDER"
        )
    main = kwargs.get("is_main_process", True)
    folder = Path(save_directory) / SUBFOLDER
    if main:
        try:
            check_free(folder, overwrite=True)
        except ProfileError as error:
            raise ConfigError(f"the profile cannot be saved beside the model: {error}") from error
    type(model).save_pretrained(model, save_directory, *args, **kwargs)  # type: ignore[attr-defined]
    if main:
        vars(model)[_PROFILE].save(folder, overwrite=True)
