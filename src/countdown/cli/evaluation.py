"""What `countdown evaluate` measures on: a text, tasks of lm-eval, or prompts to continue."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from countdown.cli import options as o
from countdown.cli import printing
from countdown.config import check_choice
from countdown.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from countdown.profiles.profile import Profile
    from countdown.profiles.recipe import Recipe
    from countdown.text import Text

# Enough tokens for shares that are stable to a point.
DIAGNOSED_WINDOWS = 2
# Which options belong to which subject, named by the option that chooses it.
OPTIONS = {
    "text": ("text", "text_dir", "windows", "window", "prompt_tokens"),
    "tasks": ("tasks", "tasks_dir", "limit", "batch_size"),
    "prompts": ("prompts", "max_new_tokens"),
}


class Subject(Protocol):
    """What a sparse model is compared with itself run dense on."""

    def prepare(self, tokenizer: Any, chosen: Profile | Recipe, context: int | None) -> None:
        """Read what is needed, before the model of this context loads; see `loading.context_of`."""

    def check(self, model: nn.Module, tokenizer: Any) -> None:
        """Raise if the model cannot take what was read, before anything is calibrated or measured."""

    def run(self, model: nn.Module, tokenizer: Any, recipe: Recipe, out: Console) -> list[dict[str, Any]]:
        """Measure a sparsified model, print what was found, and return it as records."""

    def meta(self) -> dict[str, Any]:
        """Return what a results file says about it."""


def subject(*, protocol: str | None, details: bool, **options: Any) -> Subject:
    """Return what the options choose.

    Args:
        protocol: `all`, `decode`, or None for what is usual.
        details: Measure what only JSON shows, too.
        options: Those of `OPTIONS`, None where they were not given.

    Raises:
        ConfigError: Options of several subjects, or an unknown protocol.
    """
    if protocol is not None:
        check_choice("--protocol", protocol, ("all", "decode"))
    given = {name: value for name, value in options.items() if value is not None}
    if "tasks" in given and "prompts" in given:
        raise ConfigError("give --tasks or --prompts, not both.")
    kind = next((name for name in ("tasks", "prompts") if name in given), "text")
    for name in given:
        if name not in OPTIONS[kind]:
            raise ConfigError(_misplaced(name, kind))
    if kind == "tasks":
        given["names"] = given.pop("tasks").split(",")
        return OnTasks(protocol=protocol or "all", **given)
    if kind == "prompts":
        return OnPrompts(protocol=protocol or "decode", path=given.pop("prompts"), **given)
    return OnText(protocol=protocol or "all", details=details, **given)


def _misplaced(name: str, kind: str) -> str:
    option = f"--{name.replace('_', '-')}"
    (owner,) = (owner for owner, names in OPTIONS.items() if name in names)
    if owner == "text":
        return f"{option} does not go with --{kind}, which evaluates on something else."
    return f"{option} belongs to --{owner}, which is not given."


@dataclass
class OnText:
    """Perplexity, KL and agreement on windows of a text."""

    protocol: str
    details: bool
    text: str = "python-docs"
    text_dir: Path | None = None
    windows: int = 16
    window: int | None = None
    prompt_tokens: int | None = None
    _text: Text = field(init=False)
    _ids: Tensor = field(init=False)

    def prepare(self, tokenizer: Any, chosen: Profile | Recipe, context: int | None) -> None:
        from countdown.evaluation.evaluate import check_prompt
        from countdown.loading import window_length
        from countdown.text import load_text, windows

        self._text = load_text(self.text, "evaluation", text_dir=self.text_dir)
        _check_unseen(chosen, self._text)
        self._ids = windows(tokenizer, self._text, count=self.windows, length=window_length(context, self.window))
        check_prompt(self.prompt_tokens, self._ids.shape[1])
        if self.protocol == "all" and self.prompt_tokens is None:
            _check_all(chosen)

    def check(self, model: nn.Module, tokenizer: Any) -> None:
        from countdown.loading import check_context

        check_context(model, self._ids.shape[1])

    def run(self, model: nn.Module, tokenizer: Any, recipe: Recipe, out: Console) -> list[dict[str, Any]]:
        from countdown.evaluation.evaluate import evaluate

        how: dict[str, Any] = {"protocol": self.protocol, "prompt_tokens": self.prompt_tokens}
        result = evaluate(model, self._ids, **how, progress=o.show_progress())
        printing.print_evaluation(out, recipe, result, self._text.source)
        judged = _diagnosed(model, self._ids) if self.details and not _from_prompt(recipe) else {}
        sizes = {"windows": self.windows, "window_tokens": self._ids.shape[1]}
        return [{"text": self._text.source, **sizes, **result.record(), **judged}]

    def meta(self) -> dict[str, Any]:
        return {"text": self._text.describe()}


@dataclass
class OnTasks:
    """Metrics of lm-eval's tasks."""

    protocol: str
    names: list[str]
    tasks_dir: Path | None = None
    limit: int | None = None
    batch_size: int = 1
    _tasks: list[Any] = field(init=False)

    def prepare(self, tokenizer: Any, chosen: Profile | Recipe, context: int | None) -> None:
        from countdown.integrations.lm_eval import check_protocol, load_tasks

        o.quieten_lm_eval()
        self._tasks = load_tasks(self.names, self.tasks_dir)
        check_protocol(self._tasks, self.protocol)

    def check(self, model: nn.Module, tokenizer: Any) -> None:
        pass  # lm-eval cuts what is too long

    def run(self, model: nn.Module, tokenizer: Any, recipe: Recipe, out: Console) -> list[dict[str, Any]]:
        from countdown.integrations.lm_eval import evaluate_tasks

        if o.show_progress():
            printing.say(f"scoring {', '.join(task.task_name for task in self._tasks)}, dense and sparse")
        result = evaluate_tasks(
            model,
            tokenizer,
            self._tasks,
            protocol=self.protocol,
            limit=self.limit,
            batch_size=self.batch_size,
            progress=o.show_progress() and sys.stderr.isatty(),
        )
        printing.print_tasks(out, recipe, result)
        return [record | {"limit": self.limit} for record in result.records()]

    def meta(self) -> dict[str, Any]:
        return {"lm_eval": version("lm-eval"), "batch_size": self.batch_size}


@dataclass
class OnPrompts:
    """Greedy continuations of prompts."""

    protocol: str
    path: Path
    max_new_tokens: int | None = None
    _prompts: list[str] = field(init=False)
    _new_tokens: int = field(init=False)

    def prepare(self, tokenizer: Any, chosen: Profile | Recipe, context: int | None) -> None:
        from countdown.evaluation.continuations import MAX_NEW_TOKENS, load_prompts

        self._prompts = load_prompts(self.path)
        self._new_tokens = self.max_new_tokens or MAX_NEW_TOKENS

    def check(self, model: nn.Module, tokenizer: Any) -> None:
        from countdown.evaluation.continuations import encode_prompts

        encode_prompts(model, tokenizer, self._prompts, max_new_tokens=self._new_tokens)

    def run(self, model: nn.Module, tokenizer: Any, recipe: Recipe, out: Console) -> list[dict[str, Any]]:
        from countdown.evaluation.continuations import compare_continuations

        result = compare_continuations(
            model,
            tokenizer,
            self._prompts,
            apply_to=self.protocol,
            max_new_tokens=self._new_tokens,
            progress=o.show_progress(),
        )
        printing.print_continuations(out, recipe, result)
        return result.records()

    def meta(self) -> dict[str, Any]:
        return {"prompts": self.path.name}


def _check_unseen(chosen: Profile | Recipe, text: Text) -> None:
    """Refuse to evaluate a profile on the text it was calibrated on."""
    from countdown.profiles.profile import Profile

    if not isinstance(chosen, Profile):
        return
    if any(seen.get("sha256") == text.sha256 for seen in chosen.calibration["texts"]):
        raise ConfigError(f"the profile was calibrated on this very text ({text.source}); evaluate it on another.")


def _from_prompt(recipe: Recipe) -> bool:
    return any(entry.method.selector.from_prompt for entry in recipe.entries)


def _check_all(chosen: Profile | Recipe) -> None:
    """Raise ConfigError if what is evaluated has a method that does not apply to all tokens."""
    from countdown.modules import check_applies
    from countdown.profiles.recipe import Recipe

    recipe = chosen if isinstance(chosen, Recipe) else chosen.recipe
    for entry in recipe.entries:
        check_applies(entry.method, "all")


def _diagnosed(model: nn.Module, ids: Tensor) -> dict[str, list[float]]:
    """Return how active sets compare with the exact ones, by module, on a few windows, every token sparse."""
    from countdown.evaluation.diagnostics import diagnose

    found = diagnose(model, ids[:DIAGNOSED_WINDOWS])
    parts = ("recall", "precision", "lost")
    return {f"{part}_by_module": [round(getattr(one, part), 5) for one in found] for part in parts}
