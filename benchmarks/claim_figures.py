"""Measures the arms of published claims on a model: perplexity on a text, and tasks of lm-eval."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import quality
from claim_rules import Arm
from countdown.errors import CountdownError
from countdown.evaluation.evaluate import overall
from countdown.loading import Source, load_model, load_tokenizer
from countdown.methods import method_class, named
from countdown.modules import sparse_modules
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe
from countdown.sparsify import restore_, sparsify_, status
from countdown.text import WINDOW, load_text

if TYPE_CHECKING:
    from countdown.integrations.lm_eval import Scores


@dataclass
class Bench:
    """A model, its text and its tasks."""

    texts: quality.Bench
    tasks: Sequence[Any]
    limit: int | None
    batch_size: int
    read: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Bench:
        """Load what the arguments name."""
        source = Source.parse(arguments.model)
        folder = arguments.text_dir if arguments.text == "wikitext2" else None
        valid, test = (load_text(arguments.text, split, text_dir=folder) for split in ("calibration", "evaluation"))
        tasks = _tasks(arguments.tasks, arguments.tasks_dir)
        model = load_model(source, dtype="bfloat16", device=arguments.device)
        counts = (arguments.windows, arguments.tokens)
        texts = quality.Bench(source, model, load_tokenizer(source), valid, test, *counts, False, None)
        return cls(texts, tasks, arguments.limit, arguments.batch_size, not arguments.no_text)

    @property
    def label(self) -> str:
        """What the model is called."""
        return self.texts.source.label

    def records(self, arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
        """Yield the figures of each arm; of one that this model does not take, why."""
        dense = self.scored("dense") if self.tasks else {}
        profiles: dict[Arm, Profile] = {}
        for arm in arms:
            try:
                # One calibration serves every sparsity and decision of a method.
                profile = profiles[calibration(arm)] = profiles.get(calibration(arm)) or self.calibrated(arm)
                yield from self.measured(profile, arm, dense)
            except CountdownError as error:
                if sparse_modules(self.texts.model):
                    restore_(self.texts.model)
                yield {"model": self.label, "arm": arm.label, "error": str(error)}

    def calibrated(self, arm: Arm) -> Profile:
        """Return a profile, calibrated for the sparsity of this arm."""
        recipe = Recipe.named(arm.method, sparsity=arm.sparsity, **arm.settings)
        return self.texts.calibrated(recipe, tokens=WINDOW if is_idle(arm) else None)

    def measured(self, profile: Profile, arm: Arm, dense: Scores) -> Iterator[dict[str, Any]]:
        """Yield perplexity and scores of an arm."""
        at = profile.with_settings(sparsity=arm.sparsity, decision=arm.decision)
        from_prompt = named(arm.method) is None and method_class(arm.method).selector.from_prompt
        if self.read:
            texts = replace(self.texts, prompt_tokens=WINDOW // 2) if from_prompt else self.texts
            yield texts.measured(at, arm=arm.label)
        if self.tasks and not from_prompt:  # whose tokens would all be sparse, with no prompt to choose from
            yield from self.compared(at, arm, dense)

    def compared(self, profile: Profile, arm: Arm, dense: Scores) -> Iterator[dict[str, Any]]:
        """Yield what an arm scores on each task beside the dense model."""
        from countdown.integrations.lm_eval import compared

        model = self.texts.model
        sparsify_(model, profile)
        found = compared(dense, self.scored("all"))
        realised, read = overall(status(model))
        restore_(model)
        about = {"model": self.label, "dtype": "bfloat16", "arm": arm.label, "apply_to": "all"}
        for score in found:
            yield {**about, **asdict(score), "realised_sparsity": realised, "weights_read": read}

    def scored(self, mode: str) -> Scores:
        """Return the scores of the model run so."""
        from countdown.integrations.lm_eval import CountdownLM, score_tasks

        lm = CountdownLM(self.texts.model, self.texts.tokenizer, mode=mode, batch_size=self.batch_size, progress=False)
        return score_tasks(lm, self.tasks, self.limit)


def calibration(arm: Arm) -> Arm:
    """Return the arm that stands for all that one calibration serves."""
    return replace(arm, sparsity=0.0, decision="topk" if is_idle(arm) else "threshold")


def is_idle(arm: Arm) -> bool:
    """Return whether an arm needs nothing of a text: neither thresholds nor multipliers."""
    return arm.decision == "topk" and arm.weighting == "none"


def _tasks(names: Sequence[str], folder: str | None) -> list[Any]:
    if not names:
        return []
    from countdown.integrations.lm_eval import load_tasks

    return load_tasks(names, folder)
