"""`countdown calibrate`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from countdown.cli import inputs, printing
from countdown.cli import options as o
from countdown.cli.options import AUTO
from countdown.config import CALIBRATION_TOKENS
from countdown.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from countdown.calibration.evolution import SearchSettings
    from countdown.loading import Source
    from countdown.profiles.profile import Profile
    from countdown.profiles.recipe import Recipe
    from countdown.text import Text


def calibrate(
    model: o.Model,
    output: Annotated[Path | None, o.path("-o", "--output", help="Profile to make. [NAME-METHOD]")] = None,
    method_name: Annotated[
        str, typer.Option("--method", callback=o.known_methods, help=f"{o.METHOD_HELP} auto: try them and pick.")
    ] = AUTO,
    sparsity: o.Sparsity = None,
    max_loss: Annotated[float | None, typer.Option(help="Instead of --sparsity: let perplexity rise so far.")] = None,
    decision: o.Decision = None,
    weighting: o.Weighting = None,
    allocation: o.Allocation = None,
    bits: o.Bits = None,
    alpha: o.Alpha = None,
    compensate: o.Compensate = None,
    second_look: o.SecondLook = None,
    search: Annotated[bool, typer.Option("--search", help="Of r-sparse: search α of every linear first.")] = False,
    population: Annotated[int | None, typer.Option(help="Candidates of --search at a time. [32]")] = None,
    generations: Annotated[int | None, typer.Option(help="How often --search tries them. [5]")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help=o.TEXTS_HELP)] = None,
    text_dir: o.TextDir = None,
    tokens: o.Tokens = CALIBRATION_TOKENS,
    window: o.Window = None,
    include_derived: o.IncludeDerived = False,
    overwrite: o.Overwrite = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Estimate what a method needs from a text and write it as a profile."""
    from countdown.cost import beside_bytes
    from countdown.loading import Source, load_tokenizer
    from countdown.profiles.profile import check_free
    from countdown.sites import find_sites

    settings = inputs.given_settings(sparsity, decision, weighting, allocation, bits, alpha, compensate, second_look)
    searched = _searched(search, population, generations, seed)
    way = _way(method_name, settings, max_loss, searched)
    if include_derived and not way.may_derive:
        raise ConfigError(
            f"--include-derived stores proxies (d-proxy) and low ranks (r-sparse, α below 1); {method_name} has none."
        )
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    path = output or Path(f"{source.label.rpartition('/')[2]}-{Path(method_name).stem}")
    check_free(path, overwrite=overwrite)
    if searched:
        inputs.check_file_free(_recipe_of(path), overwrite=overwrite)
    reading = _Reading(source, path, inputs.texts_of(text or ["python-docs"], text_dir), tokens, window, overwrite)
    tokenizer = load_tokenizer(source)
    way.check_text(tokenizer, reading)  # before the model loads
    loaded = inputs.load(source, dtype, device, seed)
    profile = way.profile(loaded, tokenizer, reading)
    if include_derived and profile.derives:
        profile = profile.with_derived(loaded)
    elif include_derived:
        printing.say("no derived weights are stored: what was picked or found has none")
    profile.save(path, overwrite=overwrite)
    sites = {site.name: site for site in find_sites(loaded, profile.kinds)}
    if extra := sum(beside_bytes([sites[name] for name in e.sites], e.method) for e in profile.entries):
        printing.say(f"when it runs, derived weights take {extra / 1e6:.1f} MB beside the model's")
    again = shlex.join(["countdown", "generate", model, "--profile", str(path), "Hello"])
    printing.say(f"profile of {profile.recipe} written; run: {again}")
    typer.echo(str(path))


@dataclass(frozen=True)
class _Reading:
    """What is calibrated, and on what.

    Args:
        source: The model.
        path: Of the profile to make.
        texts, tokens, window: See `countdown.calibrate`.
        overwrite: Replace what is there.
    """

    source: Source
    path: Path
    texts: list[Text]
    tokens: int
    window: int | None
    overwrite: bool

    def check_text(self, read: Any, tokenizer: Any) -> None:
        """Raise what is wrong with the text, `read` being what will take windows from it."""
        from countdown.loading import load_context, window_length

        read(tokenizer, self.texts, self.tokens, window_length(load_context(self.source), self.window))


class _Way(Protocol):
    """A way to a profile."""

    @property
    def may_derive(self) -> bool:
        """Whether the profile's methods may keep weights of their own beside the model's."""

    def check_text(self, tokenizer: Any, reading: _Reading) -> None:
        """Raise what is wrong with the text."""

    def profile(self, model: nn.Module, tokenizer: Any, reading: _Reading) -> Profile:
        """Make the profile."""


@dataclass(frozen=True)
class _Given:
    """Calibrates a recipe."""

    config: Recipe

    @property
    def may_derive(self) -> bool:
        return self.config.derives

    def check_text(self, tokenizer: Any, reading: _Reading) -> None:
        from countdown.calibration.calibrate import calibration_sequences

        if self.config.reads_text:
            reading.check_text(calibration_sequences, tokenizer)

    def profile(self, model: nn.Module, tokenizer: Any, reading: _Reading) -> Profile:
        return inputs.calibrated(
            model, tokenizer, reading.texts, self.config, reading.tokens, reading.window, reading.source
        )


@dataclass(frozen=True)
class _Searched(_Given):
    """Searches α of r-sparse, writes the recipe that is found, and calibrates it."""

    settings: SearchSettings

    @property
    def may_derive(self) -> bool:
        return True

    def check_text(self, tokenizer: Any, reading: _Reading) -> None:
        from countdown.calibration.search import search_samples
        from countdown.loading import load_context

        super().check_text(tokenizer, reading)
        search_samples(tokenizer, reading.texts, load_context(reading.source))

    def profile(self, model: nn.Module, tokenizer: Any, reading: _Reading) -> Profile:
        from countdown.calibration.search import search_alpha

        method: Any = self.config.entries[0].method
        record = reading.path.with_name(f"{reading.path.name}.search.json")
        found = search_alpha(
            model, tokenizer, reading.texts, method,
            settings=self.settings, record=record, overwrite=reading.overwrite, progress=o.show_progress(),
        ).recipe  # fmt: skip
        found.save(_recipe_of(reading.path))
        printing.say(f"α of each linear is in {_recipe_of(reading.path)}, a recipe to read, edit and give as --method")
        return _Given(found).profile(model, tokenizer, reading)


@dataclass(frozen=True)
class _Picked:
    """Tries methods and picks one."""

    settings: dict[str, Any]
    max_loss: float | None
    may_derive: bool = True

    def check_text(self, tokenizer: Any, reading: _Reading) -> None:
        from countdown.evaluation.choice import trial_sequences

        reading.check_text(trial_sequences, tokenizer)

    def profile(self, model: nn.Module, tokenizer: Any, reading: _Reading) -> Profile:
        from countdown.evaluation.choice import choose

        how: Any = {"tokens": reading.tokens, "window": reading.window, "progress": o.show_progress()}
        choice = choose(model, tokenizer, reading.texts, **self.settings, max_loss=self.max_loss, **how)
        printing.say(choice.reason)
        return choice.profile.with_name(reading.source.label)


def _way(name: str, settings: dict[str, Any], max_loss: float | None, searched: SearchSettings | None) -> _Way:
    """Return the way that the options ask for; refuse settings that are picked or found, and wishes for what is not."""
    from countdown.evaluation.choice import check_wishes

    if name != AUTO:
        if max_loss is not None:
            raise ConfigError("--max-loss belongs to --method auto, which finds the sparsity for it.")
        config = inputs.recipe_of(name, settings)
        return _Searched(_searchable(config), searched) if searched else _Given(config)
    if searched:
        raise ConfigError("--search is for α of r-sparse; give --method r-sparse.")
    if picked := [f"--{setting}" for setting in settings if setting != "sparsity"]:
        raise ConfigError(f"{picked[0]} is picked by --method auto; give it with a --method of your own.")
    check_wishes(settings.get("sparsity"), max_loss)
    return _Picked(settings, max_loss)


def _searched(search: bool, population: int | None, generations: int | None, seed: int) -> SearchSettings | None:
    from countdown.calibration.evolution import SearchSettings

    given = {"population": population, "generations": generations}
    numbers = {name: value for name, value in given.items() if value is not None}
    if not search and numbers:
        raise ConfigError(f"--{next(iter(numbers))} belongs to --search.")
    return SearchSettings(seed=seed, **numbers) if search else None


def _searchable(config: Recipe) -> Recipe:
    """Return a recipe of r-sparse alone, without an α; refuse others."""
    from countdown.methods.r_sparse import RSparse

    method = config.entries[0].method
    if len(config.entries) != 1 or config.entries[0].pattern != "*" or not isinstance(method, RSparse):
        raise ConfigError("--search is for α of r-sparse; give --method r-sparse.")
    if method.alpha != 1:
        raise ConfigError("--search finds α; leave out the one that is given.")
    return config


def _recipe_of(profile: Path) -> Path:
    """Return the file for the recipe that a search finds: beside the profile."""
    return profile.with_name(f"{profile.name}.yaml")
