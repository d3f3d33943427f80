"""Picks a method for a model: calibrates a few on part of a text and judges them on the rest of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from countdown.calibration.calibrate import Texts, calibrate, calibration_sequences
from countdown.config import CALIBRATION_TOKENS
from countdown.cost import saved_bytes, token_bytes, weights_read
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.evaluation.evaluate import evaluate
from countdown.loading import context_of, window_length
from countdown.methods import DEFAULT_METHOD, LINEAR_METHOD, Method, method, method_class, method_names
from countdown.modules import check_dense
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe, RecipeEntry
from countdown.progress import Steps, about, say
from countdown.sites import SITES, check_untouched, find_sites
from countdown.sparsify import restore_, sparsify_
from countdown.text import WINDOW, as_texts
from countdown.wrappers import base_model

# Tokens of a trial, of which every third sequence judges and the others calibrate.
TRIAL_TOKENS = 6144
JUDGING = 3
# A method that reads less is preferred while its KL is at most this many times the least.
WORSE = 1.25
# What reads more than this share just to decide bounds what others can reach; it is no choice.
MOST_TO_DECIDE = 0.5
# How many times as long as others a calibration with global allocation takes, until one was seen.
GLOBAL = 3.0
# Where a largest loss is looked for.
LEVELS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class Trial:
    """One method, or recipe of two, and what it cost on held-out text.

    Args:
        recipe: Method, weighting, allocation and sparsity.
        kl: Mean KL(dense ‖ sparse), in nats.
        loss: Rise of perplexity, as a share of the dense model's.
        token_read: Share of a token's weight bytes, those of the whole model, read at that sparsity.
    """

    recipe: Recipe
    kl: float
    loss: float
    token_read: float

    @property
    def sparsity(self) -> float:
        """The target, of all methods that share a budget."""
        return self.recipe.entries[0].method.sparsity

    def __str__(self) -> str:
        return f"{_label(self.recipe)} at {self.sparsity:g}: KL {self.kl:.4f}, reads {self.token_read:.0%}"


@dataclass(frozen=True)
class Choice:
    """What was picked, and against what.

    Args:
        profile: Of the picked method, calibrated on all the text.
        chosen: Its trial.
        others: Those that were not picked.
    """

    profile: Profile
    chosen: Trial
    others: list[Trial]

    @property
    def reason(self) -> str:
        """Two lines that say why."""
        one = self.chosen
        best: dict[tuple[str, ...], Trial] = {}
        for trial in sorted(self.others, key=lambda trial: trial.kl):
            best.setdefault(_names(trial.recipe), trial)
        others = "; ".join(str(trial) for names, trial in best.items() if names != _names(one.recipe))
        return (
            f"picked {_label(one.recipe)}, threshold at {one.sparsity:g}: KL {one.kl:.4f} and perplexity "
            f"{one.loss:+.1%} on text held out of calibration, reads {one.token_read:.0%} of a token's weights\n"
            f"instead of {others or 'nothing else'}"
        )


def choose(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    *,
    sparsity: float | None = None,
    max_loss: float | None = None,
    tokens: int = CALIBRATION_TOKENS,
    window: int | None = None,
    progress: bool = True,
) -> Choice:
    """Pick method, weighting and allocation, and calibrate them.

    Every method for FFNs that decides by threshold on half of the weights or less is tried; of the best, its other
    weightings and global allocation; and the best with `wina` on the linears outside of FFNs, on one budget that saves
    as many bytes. At a wanted sparsity, the best reads the fewest weights of those whose KL is at most `WORSE` times
    the least; at a wanted loss, of all at the highest sparsity that keeps it.

    Args:
        model, tokenizer, texts, tokens, window, progress: As for `calibrate`.
        sparsity: Wanted share of inactive neurons; with other linears, what saves as many bytes. [that of methods]
        max_loss: Instead, the largest wanted rise of perplexity, 0.02 for 2%.

    Raises:
        ConfigError: Both wishes, a loss that no method keeps, or too little text to hold any out.
        CountdownError: As `calibrate`.

    Example:
        choice = countdown.choose(model, tokenizer, text, sparsity=0.5, tokens=4096)
        print(choice.reason)
    """
    check_wishes(sparsity, max_loss)
    check_dense(base_model(model))
    texts = texts if isinstance(texts, Mapping) else as_texts(texts)
    window = window_length(context_of(base_model(model).config), window)
    sequences = trial_sequences(tokenizer, texts, tokens, window)
    held_out = _batch(sequences[::JUDGING])
    seen = _batch([sequence for place, sequence in enumerate(sequences) if place % JUDGING])

    wanted = {} if sparsity is None else {"sparsity": sparsity}
    tried = [Recipe.of(config) for config in candidates(wanted)]
    longer = _tokens(calibration_sequences(tokenizer, texts, tokens, window)) / int(seen["attention_mask"].sum())
    course = _Course(tried, longer, progress)

    def trial(config: Recipe) -> Trial:
        with course.trial(config):
            return measured(config)

    def measured(config: Recipe) -> Trial:
        with course.calibration(config):
            profile = calibrate(model, tokenizer, seen, config, progress=progress)

        def judge(at: float) -> Trial:
            return _judged(model, profile.with_settings(sparsity=at), held_out, progress)

        return judge(config.entries[0].method.sparsity) if max_loss is None else _highest(judge, max_loss)

    trials = [trial(config) for config in tried]
    best = _best(trials, max_loss)
    course.expect_changes(best.recipe)
    for change in _changes(best.recipe):
        trials.append(trial(best.recipe.with_settings(**change)))
        best = trials[-1] if _better(trials[-1], best, max_loss) else best
    if (composed := _with_others(base_model(model), best.recipe)) is not None:
        trials.append(trial(composed))
        best = trials[-1] if _better(trials[-1], best, max_loss) else best
    course.last(best.recipe)
    profile = calibrate(model, tokenizer, texts, best.recipe, tokens=tokens, window=window, progress=progress)
    return Choice(profile, best, [other for other in trials if other is not best])


class _Course:
    """How far along a choice is: trials, and at last the calibration on all of the text, which takes longest.

    Until it is known what is the best, most may come: the most changes to try, and global allocation at last.

    Args:
        tried: The first trials.
        longer: How many times the text of a trial's calibration the last one reads.
        show: Say it on stderr.
    """

    def __init__(self, tried: Sequence[Recipe], longer: float, show: bool) -> None:
        most = max(tried, key=lambda config: len(_changes(config)))
        self._trials = Steps([*map(_length, tried), *_lengths_of_changes(most)], {"global": GLOBAL})
        self._longer, self._show = longer, show
        self._took: dict[str, float] = {}  # seconds of a trial's calibration, by label
        self._longest = 0.0  # that which the last one may take

    @contextmanager
    def trial(self, config: Recipe) -> Iterator[None]:
        """Within the context, a method is tried."""
        if self._show:
            say(f"trying {_label(config)} ({self})")
        with self._trials.step(_length(config)):
            yield

    @contextmanager
    def calibration(self, config: Recipe) -> Iterator[None]:
        """Within the context, it is calibrated for its trial."""
        started = time.perf_counter()
        yield
        took = self._took[_label(config)] = time.perf_counter() - started
        self._longest = max(self._longest, self._longer * took * (1 if _is_global(config) else GLOBAL))

    def expect_changes(self, best: Recipe) -> None:
        """Take note of what is still to be tried: the best method, changed."""
        self._trials.left = _lengths_of_changes(best)

    def last(self, best: Recipe) -> None:
        """Say that the best is calibrated on all of the text."""
        if self._show:
            takes = about(self._longer * self._took[_label(best)])
            say(f"calibrating {_label(best)} on all of the text (the last step, {takes})")

    def __str__(self) -> str:
        place = f"{self._trials.done + 1} of at most {self._trials.done + len(self._trials.left) + 1}"
        if self._trials.seconds is None:
            return place
        return f"{place}, at most {about(self._trials.seconds + self._longest)} left"


def _length(config: Recipe) -> str:
    """Return what makes a trial long or short."""
    return "global" if _is_global(config) else config.entries[0].method.name


def _is_global(config: Recipe) -> bool:
    return config.entries[0].method.allocation == "global"


def _lengths_of_changes(best: Recipe) -> list[Hashable]:
    # The last: with the other linears.
    return [*(_length(best.with_settings(**change)) for change in _changes(best)), "global"]


def _label(recipe: Recipe) -> str:
    first, *others = recipe.labels()
    return f"{first}, and {', '.join(others)} with the other linears" if others else first


def _names(recipe: Recipe) -> tuple[str, ...]:
    return tuple(entry.method.name for entry in recipe.entries)


def _tokens(sequences: Sequence[Tensor]) -> int:
    return sum(len(sequence) for sequence in sequences)


def _changes(best: Recipe) -> list[dict[str, str]]:
    """Return what of the best method is changed to see whether that is better."""
    method = best.entries[0].method
    others = [{"weighting": name} for name in method.weightings if name != method.weighting]
    return [*others, {"allocation": "global"}]


def _with_others(model: nn.Module, best: Recipe) -> Recipe | None:
    """Return the best method with `LINEAR_METHOD` on the linears outside of FFNs; one budget saves as many bytes.

    None where there are no such linears, or some that it does not take, as those with adapters.
    """
    config = best.entries[0].method
    ffns = find_sites(model, [config.kind])
    inside = tuple(f"{ffn.name}." for ffn in ffns)
    with suppress(UnsupportedModelError):
        others = [site for site in find_sites(model, ["linear"]) if not site.name.startswith(inside)]
        for site in others:
            check_untouched(site)
        linear = method(LINEAR_METHOD, sparsity=config.sparsity, allocation="global")
        part, rest = (sum(saved_bytes(site, its) for site in of) for of, its in ((ffns, config), (others, linear)))
        if rest <= 0:
            return None
        settings: Any = {"sparsity": round(config.sparsity * part / (part + rest), 3), "allocation": "global"}
        entries = tuple(RecipeEntry(replace(one, **settings)) for one in (config, linear))
        return Recipe(entries, "global")
    return None


def trial_sequences(tokenizer: Any, texts: Texts, tokens: int, window: int = WINDOW) -> list[Tensor]:
    """Return the sequences that trials read, each int64 `[length]`.

    Raises:
        ConfigError, TextError: Too little text for trials, or for the calibration of so many tokens that follows.
    """
    calibration_sequences(tokenizer, texts, tokens, window)
    sequences = calibration_sequences(tokenizer, texts, min(tokens, TRIAL_TOKENS), window)
    if len(sequences) < JUDGING:
        raise ConfigError(
            f"picking a method takes {JUDGING} sequences of text or more, and there are {len(sequences)}: give more "
            "tokens, or name a method."
        )
    # Several texts take turns: in another order, some of each is held out.
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu")
    return [sequences[place] for place in order.tolist()]


def check_wishes(sparsity: float | None, max_loss: float | None) -> None:
    """Raise ConfigError unless at most one of them is wished for, and can be had."""
    if sparsity is not None:
        candidates({"sparsity": sparsity})
    if sparsity is not None and max_loss is not None:
        raise ConfigError("give a sparsity or a largest loss, not both: one follows from the other.")
    if max_loss is not None and not max_loss > 0:
        raise ConfigError(f"the largest loss is {max_loss}, expected more than 0 (0.02 lets perplexity rise by 2%).")


def candidates(wanted: Mapping[str, Any] | None = None) -> list[Method]:
    """Return the methods to try, with these settings, weighted as most do best."""
    classes = {name: method_class(name) for name in method_names()}
    usual = {name: "rms" if "rms" in cls.weightings else "none" for name, cls in classes.items()}
    fitting = [name for name, cls in classes.items() if cls.kind == _kind() and "threshold" in cls.decisions]
    found = [method(name, weighting=usual[name], decision="threshold", **wanted or {}) for name in fitting]
    roles = len(SITES.get(_kind()).site.sum_class.roles)
    return [config for config in found if len(config.selector.reads) / roles <= MOST_TO_DECIDE]


def _kind() -> str:
    """Return the kind of site that methods are picked for."""
    return method_class(DEFAULT_METHOD).kind


def _judged(model: nn.Module, profile: Profile, held_out: Mapping[str, Tensor], progress: bool) -> Trial:
    sparsify_(model, profile)
    try:
        found = evaluate(model, held_out, progress=progress)
    finally:
        restore_(model)
    loss = found.perplexity / found.dense_perplexity - 1
    return Trial(profile.recipe, found.kl, loss, _token_read(base_model(model), profile))


def _token_read(model: nn.Module, profile: Profile) -> float:
    """Return the share of a token's weight bytes that is read, as far as methods meet their targets."""
    sites = {site.name: site for site in find_sites(model, profile.kinds)}
    saved = 0.0
    for entry in profile.entries:
        own = [sites[name] for name in entry.sites]
        saved += sum(site.nbytes for site in own) * (1 - weights_read(own, entry.method))
    return 1 - saved / token_bytes(model, ()).total


def _highest(judge: Callable[[float], Trial], max_loss: float) -> Trial:
    """Return the trial of the highest of `LEVELS` whose loss is small enough, or of the lowest."""
    low, high, best = 0, len(LEVELS), judge(LEVELS[0])
    while best.loss <= max_loss and high - low > 1:
        middle = (low + high) // 2
        found = judge(LEVELS[middle])
        low, high, best = (middle, high, found) if found.loss <= max_loss else (low, middle, best)
    return best


def _best(trials: Sequence[Trial], max_loss: float | None) -> Trial:
    if max_loss is None:
        least = min(trial.kl for trial in trials)
        good = [trial for trial in trials if trial.kl <= WORSE * least]
    else:
        good = [trial for trial in trials if trial.loss <= max_loss]
        if not good:
            nearest = min(trials, key=lambda trial: trial.loss)
            raise ConfigError(
                f"no method keeps perplexity within {max_loss:+.1%}: {_label(nearest.recipe)} at "
                f"{nearest.sparsity:g} costs {nearest.loss:+.1%} already; allow more."
            )
    return min(good, key=lambda trial: (trial.token_read, trial.kl))


def _better(trial: Trial, best: Trial, max_loss: float | None) -> bool:
    """Return whether a change of the best method is better: it reads as much, or keeps the loss."""
    if max_loss is None:
        return trial.kl < best.kl
    return trial.loss <= max_loss and (trial.token_read, trial.kl) < (best.token_read, best.kl)


def _batch(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return sequences as tokenizers return them, padded on the right."""
    mask = [torch.ones_like(sequence) for sequence in sequences]
    padded = [torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in (sequences, mask)]
    return dict(zip(("input_ids", "attention_mask"), padded, strict=True))
