"""Picks a method for a model: calibrates a few on part of a text and judges them on the rest of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from countdown.calibration.calibrate import Texts, calibrate, calibration_sequences
from countdown.calibration.passes.affine import LEVELS as FITTED
from countdown.calibration.passes.affine import TOKENS_EACH
from countdown.config import CALIBRATION_TOKENS
from countdown.cost import saved_bytes, token_bytes, weights_read
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.evaluation.evaluate import evaluate
from countdown.loading import context_of, window_length
from countdown.methods import (
    DEFAULT_METHOD,
    LINEAR_METHOD,
    SECOND_LOOK,
    Method,
    method,
    method_class,
    method_names,
)
from countdown.modules import check_dense
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe, RecipeEntry
from countdown.progress import Steps, about, say
from countdown.sites import SITES, Site, check_untouched, find_sites
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
# Shares of a token's weights that are alike; and how near a sparsity is looked for that reads as much as another.
ALIKE, NEAR = 0.005, 1e-3
# Where a largest loss is looked for.
LEVELS = tuple(round(0.05 * step, 2) for step in range(1, 20))
# What makes a method predict what dropped terms would add.
PREDICTING = {"compensate": "affine"}
# Returns what the best is changed to, None where it cannot be.
Change = Callable[[Recipe], Recipe | None]


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
        best: dict[Hashable, Trial] = {}
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

    Every method for FFNs that decides by threshold on half of the weights or less is tried, with a second look where it
    offers one; of the best, its other weightings and global allocation; the best with `wina` on the linears outside of
    FFNs, on one budget that saves as many bytes; and the best with what dropped neurons would add predicted, against
    itself at the lower sparsity at which it reads as much. At a wanted sparsity, the best reads the fewest weights of
    those whose KL is at most `WORSE` times the least; at a wanted loss, of all at the highest sparsity that keeps it.

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
    dense = base_model(model)
    check_dense(dense)
    texts = texts if isinstance(texts, Mapping) else as_texts(texts)
    window = window_length(context_of(dense.config), window)
    needed = _to_predict(dense)
    sequences = trial_sequences(tokenizer, texts, tokens, window, at_least=needed)
    seen = [sequence for place, sequence in enumerate(sequences) if place % JUDGING]

    first = [Recipe.of(config) for config in candidates({} if sparsity is None else {"sparsity": sparsity})]
    longer = _tokens(calibration_sequences(tokenizer, texts, tokens, window)) / _tokens(seen)
    course = _Course(first, longer, progress)
    trials = _Trials(model, tokenizer, (_batch(seen), _batch(sequences[::JUDGING])), max_loss, course, progress)
    found = [trials.of(config, _kind_of(config)) for config in first]
    best = _best(found, max_loss)
    predicting = partial(_predicting, tokens=_tokens(seen), needed=needed)
    changes: list[tuple[str, Change]]
    changes = [*_changes(best.recipe), ("global", partial(_with_others, dense)), ("prediction", predicting)]
    course.expect([kind for kind, _ in changes])
    for kind, change in changes:
        config = change(best.recipe)
        if config is None:
            course.skip(kind)
            continue
        found.append(trials.of(config, kind))
        best = found[-1] if trials.is_better(found[-1], best) else best
    course.last(best.recipe)
    profile = calibrate(model, tokenizer, texts, best.recipe, tokens=tokens, window=window, progress=progress)
    return Choice(profile, best, [other for other in (*found, *trials.rivals) if other is not best])


class _Trials:
    """Calibrates what is tried on part of a text, and judges it on the rest.

    Args:
        model, tokenizer, progress: See `choose`.
        texts: To calibrate on, and to judge on.
        max_loss: See `choose`; None to judge at the sparsities of what is tried.
        course: Is told what is done.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        max_loss: float | None,
        course: _Course,
        progress: bool,
    ) -> None:
        self._model, self._tokenizer, self._max_loss = model, tokenizer, max_loss
        self._seen, self._held_out = texts
        self._course, self._progress = course, progress
        self._profiles: dict[str, Profile] = {}
        self.rivals: list[Trial] = []  # what was the best, where it reads as much as what it was changed to

    def of(self, config: Recipe, kind: str) -> Trial:
        """Try it, at its sparsity or at the highest that keeps the loss; `kind` is what makes that long or short."""
        with self._course.trial(config, kind):
            with self._course.calibration(config):
                profile = calibrate(self._model, self._tokenizer, self._seen, config, progress=self._progress)
            self._profiles[_label(config)] = profile
            if self._max_loss is None:
                return self._at(config, config.entries[0].method.sparsity)
            return _highest(partial(self._at, config), self._max_loss, _levels(config))

    def _at(self, config: Recipe, sparsity: float) -> Trial:
        profile = self._profiles[_label(config)].with_settings(sparsity=sparsity)
        return _judged(self._model, profile, self._held_out, self._progress)

    def is_better(self, trial: Trial, best: Trial) -> bool:
        """Return whether what the best was changed to is better: at the same bytes, or with less that keep the loss."""
        if self._max_loss is not None:
            return trial.loss <= self._max_loss and (trial.token_read, trial.kl) < (best.token_read, best.kl)
        if trial.token_read > best.token_read + ALIKE:
            best = self._at_same_bytes(trial.token_read, best)
            self.rivals.append(best)
        return trial.kl < best.kl

    def _at_same_bytes(self, share: float, one: Trial) -> Trial:
        """Judge it at the sparsity at which it reads this share of a token's weights."""
        profile, model = self._profiles[_label(one.recipe)], base_model(self._model)
        sites = find_sites(model, profile.kinds)
        low, high = 0.0, one.sparsity
        while high - low > NEAR:
            middle = (low + high) / 2
            more = _token_read(model, profile.with_settings(sparsity=middle), sites) > share
            low, high = (middle, high) if more else (low, middle)
        return self._at(one.recipe, high)


class _Course:
    """How far along a choice is: trials, and at last the calibration on all of the text, which takes longest.

    Until it is known what is the best, most may come: the most changes to try, and global allocation at last.

    Args:
        tried: The first trials.
        longer: How many times the text of a trial's calibration the last one reads.
        show: Say it on stderr.
    """

    def __init__(self, tried: Sequence[Recipe], longer: float, show: bool) -> None:
        most = max((_changes(config) for config in tried), key=len)
        kinds = [*map(_kind_of, tried), *(kind for kind, _ in most), "global", "prediction"]
        self._trials = Steps(kinds, {"global": GLOBAL})
        self._longer, self._show = longer, show
        self._took: dict[str, float] = {}  # seconds of a trial's calibration, by label
        self._longest = 0.0  # that which the last one may take

    @contextmanager
    def trial(self, config: Recipe, kind: str) -> Iterator[None]:
        """Within the context, a method is tried."""
        if self._show:
            say(f"trying {_label(config)} ({self})")
        with self._trials.step(kind):
            yield

    @contextmanager
    def calibration(self, config: Recipe) -> Iterator[None]:
        """Within the context, it is calibrated for its trial."""
        started = time.perf_counter()
        yield
        took = self._took[_label(config)] = time.perf_counter() - started
        self._longest = max(self._longest, self._longer * took * (1 if _is_global(config) else GLOBAL))

    def expect(self, kinds: Sequence[str]) -> None:
        """Take note of what is still to be tried."""
        self._trials.left = list(kinds)

    def skip(self, kind: str) -> None:
        """Take note that one of these is not tried."""
        self._trials.left.remove(kind)

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


def _kind_of(config: Recipe) -> str:
    return config.entries[0].method.name


def _is_global(config: Recipe) -> bool:
    return config.entries[0].method.allocation == "global"


def _label(recipe: Recipe) -> str:
    first, *others = recipe.labels()
    return f"{first}, and {', '.join(others)} with the other linears" if others else first


def _names(recipe: Recipe) -> tuple[tuple[str, bool], ...]:
    """Return the methods' names, and which of them predict."""
    return tuple((entry.method.name, bool(entry.method.fitted)) for entry in recipe.entries)


def _tokens(sequences: Sequence[Tensor]) -> int:
    return sum(len(sequence) for sequence in sequences)


def _changes(best: Recipe) -> list[tuple[str, Change]]:
    """Return what makes a change of the best's settings long or short, and the change."""
    method = best.entries[0].method
    others = [name for name in method.weightings if name != method.weighting]
    weighted = [(method.name, partial(_with, {"weighting": name})) for name in others]
    return [*weighted, ("global", partial(_with, {"allocation": "global"}))]


def _with(settings: Mapping[str, str], best: Recipe) -> Recipe:
    return best.with_settings(**settings)


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


def _predicting(best: Recipe, *, tokens: int, needed: int) -> Recipe | None:
    """Return it with what dropped terms would add predicted; None where its method cannot, or the text is too short."""
    return _with(PREDICTING, best) if can_predict(best.entries[0].method) and tokens >= needed else None


def can_predict(method: Method) -> bool:
    """Return whether a method can predict what dropped terms would add."""
    return PREDICTING.keys() <= {field.name for field in fields(method)}


def _to_predict(model: nn.Module) -> int:
    """Return how many tokens calibrate a prediction at least."""
    return TOKENS_EACH * max(site.sum.weights[0].shape[1] for site in find_sites(model, [_kind()]))


def trial_sequences(
    tokenizer: Any, texts: Texts, tokens: int, window: int = WINDOW, *, at_least: int = 0
) -> list[Tensor]:
    """Return the sequences that trials read, each int64 `[length]`: more than usual if they calibrate on `at_least`.

    Raises:
        ConfigError, TextError: Too little text for trials, or for the calibration of so many tokens that follows.
    """
    calibration_sequences(tokenizer, texts, tokens, window)
    # Rounds of those that calibrate and the one that judges, as many of each text.
    count = 1 if isinstance(texts, Mapping) else len(as_texts(texts))
    rounds = -(-at_least // ((JUDGING - 1) * window * count)) * count
    enough = max(TRIAL_TOKENS, rounds * JUDGING * window)
    sequences = calibration_sequences(tokenizer, texts, min(tokens, enough), window)
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
    if sparsity == 0:
        raise ConfigError("at a sparsity of 0 nothing is skipped: give a higher one, or --method.")
    if sparsity is not None and max_loss is not None:
        raise ConfigError("give a sparsity or a largest loss, not both: one follows from the other.")
    if max_loss is not None and not max_loss > 0:
        raise ConfigError(f"the largest loss is {max_loss}, expected more than 0 (0.02 lets perplexity rise by 2%).")


def candidates(wanted: Mapping[str, Any] | None = None) -> list[Method]:
    """Return the methods to try, with these settings, else with those with which most do best."""
    classes = [method_class(name) for name in method_names()]
    fitting = [cls for cls in classes if cls.kind == _kind() and "threshold" in cls.decisions]
    found = [method(cls.name, **_usual(cls) | dict(wanted or {})) for cls in fitting]
    roles = len(SITES.get(_kind()).site.sum_class.roles)
    return [config for config in found if len(config.selector.reads) / roles <= MOST_TO_DECIDE]


def _usual(cls: type[Method]) -> dict[str, Any]:
    look = {"second_look": SECOND_LOOK} if cls.has("second_look") else {}
    return {"weighting": "rms" if "rms" in cls.weightings else "none", "decision": "threshold", **look}


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


def _token_read(model: nn.Module, profile: Profile, sites: Sequence[Site] | None = None) -> float:
    """Return the share of a token's weight bytes that is read, as far as methods meet their targets.

    Args:
        model: Dense.
        profile: Says which.
        sites: Those of its kinds, where they are known: to find them takes time.
    """
    by_name = {site.name: site for site in sites or find_sites(model, profile.kinds)}
    saved = 0.0
    for entry in profile.entries:
        own = [by_name[name] for name in entry.sites]
        saved += sum(site.nbytes for site in own) * (1 - weights_read(own, entry.method))
    return 1 - saved / token_bytes(model, ()).total


def first_level(config: Recipe) -> float:
    """Return from which sparsity on a prediction is fitted, if there is one, beside that for the recipe's own."""
    return FITTED[0] if config.entries[0].method.fitted else 0.0


def _levels(config: Recipe) -> list[float]:
    """Return where the largest loss is looked for: not where nothing would be predicted."""
    first = min(first_level(config), config.entries[0].method.sparsity)
    return [level for level in LEVELS if level >= first]


def _highest(judge: Callable[[float], Trial], max_loss: float, levels: Sequence[float]) -> Trial:
    """Return the trial of the highest of ascending levels whose loss is small enough, or of the lowest."""
    low, high, best = 0, len(levels), judge(levels[0])
    while best.loss <= max_loss and high - low > 1:
        middle = (low + high) // 2
        found = judge(levels[middle])
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


def _batch(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return sequences as tokenizers return them, padded on the right."""
    mask = [torch.ones_like(sequence) for sequence in sequences]
    padded = [torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in (sequences, mask)]
    return dict(zip(("input_ids", "attention_mask"), padded, strict=True))
