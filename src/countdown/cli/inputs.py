"""What commands make of their options: settings, recipes, profiles, texts, a loaded model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countdown.cli import options as o
from countdown.cli import printing
from countdown.cli.options import AUTO
from countdown.errors import ConfigError
from countdown.files import streams, unwritable_file

if TYPE_CHECKING:
    from torch import nn

    from countdown.engine.sampling import Sampling
    from countdown.loading import Source
    from countdown.profiles.profile import Profile
    from countdown.profiles.recipe import Recipe
    from countdown.text import Text


def check_file_free(path: Path, *, overwrite: bool) -> None:
    """Refuse to write over a file, or where none can be written."""
    if problem := unwritable_file(path):
        raise ConfigError(problem)
    if path.exists() and not streams(path) and not overwrite:
        raise ConfigError(f"{path} exists already; give another --output or --overwrite.")


def read_stdin() -> str:
    if sys.stdin is None:
        raise ConfigError("the prompt is - but stdin is closed; give a prompt, or pipe one in.")
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt from stdin is not text in {sys.stdin.encoding}.") from error


def given_settings(
    sparsity: float | None,
    decision: str | None,
    weighting: str | None,
    allocation: str | None,
    bits: int | None,
    alpha: float | None,
    compensate: str | None = None,
    second_look: float | None = None,
) -> dict[str, Any]:
    """Return the settings that were given."""
    settings = {"sparsity": sparsity, "decision": decision, "weighting": weighting, "allocation": allocation}
    settings |= {"bits": bits, "alpha": alpha, "compensate": compensate, "second_look": second_look}
    return {name: value for name, value in settings.items() if value is not None}


def sampling(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int,
) -> Sampling | None:
    """Return how tokens are drawn; None where nothing was said of it."""
    from countdown.engine.sampling import Sampling

    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_drawn(given, temperature)
    if temperature is None and repetition_penalty is None:
        return None
    given |= {"temperature": temperature, "repetition_penalty": repetition_penalty, "seed": seed}
    return Sampling().with_(**given)


def check_drawn(given: dict[str, Any], temperature: float | None) -> None:
    """Refuse settings of which tokens may be drawn where none is."""
    for name in ("top_k", "top_p", "min_p"):
        if given[name] is not None and not temperature:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is for tokens that are drawn: give a --temperature above 0, too.")


def recipe_of(name: str, settings: dict[str, Any]) -> Recipe:
    """Return the recipe in the file of this name, or of the method of this name."""
    from countdown.profiles.recipe import SUFFIXES, Recipe

    if name == AUTO:
        raise ConfigError("--method auto belongs to countdown calibrate; give its --profile here.")
    if Path(name).suffix in SUFFIXES:
        return Recipe.load(name).with_settings(**settings)
    return Recipe.named(name, **settings)


def chosen(path: Path | None, name: str | None, settings: dict[str, Any], source: Source) -> Profile | Recipe | None:
    """Return the profile that the options name, with their settings, or what to calibrate, or the model's own."""
    from countdown.profiles.profile import Profile
    from countdown.profiles.saving import own_profile

    if path is not None and name is not None:
        raise ConfigError("give --profile or --method, not both: a profile has its method.")
    if name is not None:
        return recipe_of(name, settings)
    profile = own_profile(source) if path is None else Profile.load(path, model=source.given)
    if profile is None and settings:
        raise ConfigError(f"--{next(iter(settings))} needs --profile or --method; without, the model is dense.")
    if profile is not None and path is None:
        printing.say(f"using the profile in {source.label}")
    return profile and profile.with_settings(**settings)


def texts_of(names: list[str], text_dir: Path | None) -> list[Text]:
    """Return the texts to calibrate on; `text_dir` goes to wikitext2, or else to what refuses it."""
    from countdown.text import load_text

    elsewhere = "wikitext2" not in names
    return [
        load_text(name, "calibration", text_dir=text_dir if elsewhere or name == "wikitext2" else None)
        for name in names
    ]


def calibration_text(chosen: Profile | Recipe, text: str, text_dir: Path | None) -> list[Text] | None:
    """Return what to calibrate a method on: another split of a built-in text, python-docs for a file."""
    from countdown.profiles.profile import Profile
    from countdown.text import BUILT_IN, load_text

    if isinstance(chosen, Profile) or not chosen.reads_text:
        return None
    if text in BUILT_IN:
        return [load_text(text, "calibration", text_dir=text_dir)]
    return [load_text("python-docs", "calibration")]


def as_profile(
    chosen: Profile | Recipe,
    model: nn.Module,
    tokenizer: Any,
    texts: list[Text] | None,
    tokens: int,
    window: int | None,
    source: Source,
) -> Profile:
    from countdown.profiles.profile import Profile

    if isinstance(chosen, Profile):
        return chosen
    return calibrated(model, tokenizer, texts or [], chosen, tokens, window, source)


def calibrated(
    model: nn.Module,
    tokenizer: Any,
    texts: list[Text],
    config: Recipe,
    tokens: int,
    window: int | None,
    source: Source,
) -> Profile:
    from countdown.calibration.calibrate import calibrate

    made = calibrate(model, tokenizer, texts, config, tokens=tokens, window=window, progress=o.show_progress())
    return made.with_name(source.label)


def load(source: Source, dtype: str, device: str, seed: int) -> nn.Module:
    import torch

    from countdown.loading import load_model
    from countdown.ops import backends  # noqa: F401  (their names become known)
    from countdown.ops.request import requested

    requested()  # a backend that does not exist is said before the model loads
    torch.manual_seed(seed)
    return load_model(source, dtype=dtype, device=device)
