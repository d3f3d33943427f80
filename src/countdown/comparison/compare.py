"""Compares configurations of a model from end to end: a model in, measurements and a recommendation out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from countdown.comparison import markdown
from countdown.comparison import quantised as schemes
from countdown.comparison.cache import Cache, default_folder
from countdown.comparison.comparison import FILE, KINDS, TABLE, Cell, Comparison, Recommendation
from countdown.comparison.effort import QUICK, USUAL
from countdown.comparison.grid import DENSE, Configuration, Wish, configurations
from countdown.comparison.outcome import Outcome
from countdown.comparison.quality import loss_of
from countdown.comparison.recommend import nearest, recommend
from countdown.comparison.session import CONTEXT, NEW_TOKENS, PROMPT, Protocol, Session
from countdown.comparison.tasks import described, tasks_of
from countdown.errors import OVERWRITE, ConfigError, CountdownError
from countdown.files import unwritable_file, write_text
from countdown.loading import Source
from countdown.methods import Method
from countdown.profiles.profile import check_free
from countdown.profiles.recipe import Recipe
from countdown.results import meta
from countdown.text import WINDOW

PROFILE, TABLES = "profile", "comparison.md"
# Where a user looks: few rounds of timing may not show as faster what is.
_ROUGHLY = "This is rough: the full comparison (countdown compare without --quick) decides, and may recommend another."
# Speeds of one model that differ by less than this are the same.
SAME_SPEED = 0.05


def compare(
    model: str,
    *,
    methods: Sequence[str | Method | Recipe] | None = None,
    sparsities: Sequence[float] | None = None,
    max_loss: float | None = None,
    min_speedup: float | None = None,
    quantised: bool = True,
    speed: bool = True,
    quick: bool = False,
    windows: int | None = None,
    tokens: int | None = None,
    text: str = "python-docs",
    text_dir: str | Path | None = None,
    prompt: str = PROMPT,
    tasks: str | Sequence[str] | None = None,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
    on_cell: Callable[[Cell], None] = lambda _: None,
    facts: Mapping[str, Any] | None = None,
) -> Comparison:
    """Measure a model dense, sparse and quantised, quality and speed on this machine, and recommend one of them.

    Measurements are kept in a cache by all that they depend on, so an interrupted comparison continues, and an
    extended one measures what is new.

    Args:
        model: Hub id, folder or GGUF file.
        methods, sparsities: See `grid.configurations`.
        max_loss, min_speedup: See `Wish`.
        quantised: Measure what torchao makes of the dense model, too.
        speed: Measure speed; without, the recommendation goes by bytes.
        quick: Measure less, to have rough numbers soon: fewer windows, tokens, rounds, methods and sparsities, where
            they are not given. The comparison says that it is rough.
        windows, tokens, text, text_dir, prompt, dtype, device, seed: See `Protocol`.
        tasks, tasks_dir, limit, batch_size: Score every configuration on tasks of lm-eval, too; see `tasks.tasks_of`.
        revision, trust_remote_code: See `Source`.
        output: A folder for `comparison.json`, `comparison.csv`, `comparison.md` (see `markdown.render`) and, where
            a sparse configuration is recommended, its `profile`. A comparison that is there is extended: its cells are
            kept.
        overwrite: Replace a comparison that is there instead.
        fresh: Measure all again, whatever the cache holds.
        progress: Show progress on stderr.
        say: Called with a line at the start of each step.
        on_cell: Called with each configuration that is measured now, as soon as it is.
        facts: More for the comparison's `meta`.

    Raises:
        ConfigError: A setting is out of range, there is no such task, or no lm-eval for it, or `output` holds a
            comparison of another model, text or version.
        TextError: A text is missing or too short.
        UnsupportedModelError: The model has no gated FFNs.
        CountdownError: The dense model cannot be measured.

    Example:
        found = countdown.compare("my-model", methods=["cats"], sparsities=[0.5], quantised=False, speed=False)
        print(found.recommendation)
    """
    started = time.perf_counter()
    wish, effort = Wish(max_loss, min_speedup), QUICK if quick else USUAL
    if min_speedup is not None and not speed:
        raise ConfigError("a least speed-up is wished for, but speed is not measured; leave out one of the two.")
    sparse = configurations(methods, sparsities, effort)
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    windows = effort.windows if windows is None else windows
    tokens = effort.tokens if tokens is None else tokens
    protocol = Protocol(text, text_dir, windows, tokens, prompt, dtype, device, seed, effort.rounds)
    cache = Cache(default_folder(), fresh=fresh)
    cache.check()
    protocol = replace(protocol, tasks=tasks_of(tasks, tasks_dir, limit, batch_size))
    session = Session(source, protocol, cache, speed=speed, progress=progress, say=say)
    folder = None if output is None else Path(output)
    plan = _extended([DENSE, *sparse, *_quantised(session, quantised)], _earlier(folder, overwrite, session))
    found = []
    for one in session.cells(plan):
        if one.cell.kind == DENSE.kind and one.cell.error is not None:
            raise CountdownError(f"the dense model cannot be measured: {one.cell.error}")
        if one.now:
            on_cell(one.cell)
        found.append(one)
    cells = [one.cell for one in found]
    caveats = [_rough(protocol)] if quick else []
    caveats += _caveats(session, plan, [one.outcomes for one in found], quantised)
    caveats += [*_drift(cells), *_doubts(cells)]
    advice = _recommended(session, plan, cells, wish)
    if advice is None:
        caveats.append(nearest(cells, wish))
    elif quick:
        advice = replace(advice, reason=f"{advice.reason} {_ROUGHLY}")
    about = _about(session, wish, found[0].outcomes, caveats)
    about |= {"rough": quick, "this_run_took_s": round(time.perf_counter() - started, 1)}
    comparison = Comparison(meta(**facts or {}, **about), cells, advice)
    if folder is not None:
        _save(comparison, folder, session, plan)
    return comparison


def _quantised(session: Session, wanted: bool) -> list[Configuration]:
    if not wanted or schemes.missing():
        return []
    return [Configuration(name, "quantised", scheme=name) for name in schemes.schemes(session.device)]


def _earlier(folder: Path | None, overwrite: bool, session: Session) -> Comparison | None:
    """Return the comparison to extend, or raise if the folder has something else."""
    if folder is None:
        return None
    extends = not overwrite and (folder / FILE).exists()
    _check_output(folder, replaces=overwrite or extends)
    if not extends:
        return None
    earlier = Comparison.load(folder)
    check_same(earlier, session.identity, folder)
    check_same_tasks(earlier, described(session.protocol.tasks), folder)
    return earlier


def _check_output(folder: Path, *, replaces: bool) -> None:
    """Raise unless a comparison can be written to a folder, in place of what is there or where nothing is."""
    for name in (FILE, TABLE, TABLES):
        if problem := unwritable_file(folder / name):
            raise ConfigError(problem)
    taken = [] if replaces else [name for name in (TABLE, TABLES, PROFILE) if (folder / name).exists()]
    if taken:
        raise ConfigError(f"{folder / taken[0]} exists already; give another output or {OVERWRITE}.")
    if (folder / PROFILE).exists():
        check_free(folder / PROFILE, overwrite=True)


def check_same(earlier: Comparison, identity: Mapping[str, Any], where: Path) -> None:
    """Raise ConfigError unless a comparison was made of what `identity` says; see `Session.identity`."""
    _check_equal(earlier.meta.get("identity", {}), identity, f"{where} holds a comparison")


def check_same_tasks(earlier: Comparison, tasks: Mapping[str, Mapping[str, Any]], where: Path) -> None:
    """Raise ConfigError unless all that a comparison scored is among `tasks`; see `tasks.described`."""
    for name, before in earlier.meta.get("tasks", {}).items():
        if name not in tasks:
            raise ConfigError(
                f"{where} holds scores on task {name}, which is not asked for now and would be lost; give the same "
                f"tasks, or more, another output, or {OVERWRITE}."
            )
        _check_equal(before, tasks[name], f"{where} holds scores on task {name}")


def _check_equal(before: Mapping[str, Any], now: Mapping[str, Any], held: str) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{held} with other {name} ({_short(before.get(name))}, not {_short(value)}): "
                f"numbers of different models, texts or versions are not mixed; give another output or {OVERWRITE}."
            )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _extended(plan: list[Configuration], earlier: Comparison | None) -> list[Configuration]:
    """Return the plan, and what an earlier comparison measured besides."""
    labels = {configuration.label for configuration in plan}
    kept = [Configuration.of_cell(cell) for cell in earlier.cells if cell.label not in labels] if earlier else []
    every = [*kept, *plan]
    names = list(dict.fromkeys(one.name for one in every))
    # An extended comparison reads as one made at once.
    return sorted(every, key=lambda one: (KINDS.index(one.kind), names.index(one.name), one.sparsity or 0.0))


def _recommended(
    session: Session, plan: Sequence[Configuration], cells: Sequence[Cell], wish: Wish
) -> Recommendation | None:
    """Return the recommendation, confirmed on other windows where there are any."""
    others = session.facts()["others"]
    advice = recommend(cells, wish, others, seed=session.protocol.seed)
    if advice is None or advice.label == DENSE.label or not others:
        return advice
    loss = loss_of(session.confirm(_of(plan, advice.label)))
    low, high = advice.interval
    return replace(advice, confirmed_loss=loss, confirmed=low <= loss <= high)


def _of(plan: Sequence[Configuration], label: str) -> Configuration:
    return next(configuration for configuration in plan if configuration.label == label)


def _caveats(
    session: Session, plan: Sequence[Configuration], outcomes: Sequence[Mapping[str, Outcome]], quantised: bool
) -> list[str]:
    """Return what must be said beside the numbers."""
    found = [schemes.missing() if quantised else None]
    reasons: dict[str, list[str]] = {}
    for configuration, outcome in zip(plan, outcomes, strict=True):
        speed = outcome.get("speed")
        if speed is not None and speed.refused:
            reasons.setdefault(str(speed.problem), []).append(configuration.label)
    for reason, labels in reasons.items():
        who = "any configuration" if len(labels) == len(plan) else ", ".join(labels)
        found.append(f"No speed was measured of {who}: {reason}")
    few_bits = [one.label for one in plan if one.scheme == "int4" or (one.recipe and one.recipe.has_proxy)]
    if session.source.gguf_file and few_bits:
        found.append(
            "The weights come from a GGUF file. If they were stored in few bits, what rounds them to few bits again "
            "(int4, proxies) fits their grid by luck, and costs less here than on weights that were never rounded."
        )
    return [caveat for caveat in found if caveat]


def _drift(cells: Sequence[Cell]) -> list[str]:
    """Return a caveat where dense ran at another speed beside some cells."""
    speeds = [cell.speed for cell in cells if cell.speed is not None and cell.doubt is None]
    dense = [speed.dense_beside for speed in speeds]
    if not dense or max(dense) <= (1 + SAME_SPEED) * min(dense):
        return []
    return [
        f"Dense ran at {min(dense):.1f} to {max(dense):.1f} tokens/s while the others were timed, as other work came "
        "and went: each speed-up is over dense timed beside it, so compare those, not tokens/s."
    ]


def _rough(protocol: Protocol) -> str:
    return (
        f"This comparison is quick, and rough: {protocol.windows} windows, calibration on {protocol.tokens} tokens, "
        "few rounds of timing, few methods and sparsities. Before you decide, run countdown compare without --quick."
    )


def _doubts(cells: Sequence[Cell]) -> list[str]:
    """Return a caveat for each speed-up that is not to be relied on."""
    return [
        f"The speed-up of {cell.label} is unreliable, and it is not recommended: {cell.doubt}. The same comparison "
        "measures it again, best when less runs on the machine."
        for cell in cells
        if cell.doubt
    ]


def _about(session: Session, wish: Wish, dense: Mapping[str, Outcome], caveats: list[str]) -> dict[str, Any]:
    """Return what is said of the whole comparison."""
    protocol, facts = session.protocol, session.facts()
    speed = dense.get("speed")
    return {
        "model": session.source.label,
        "wish": str(wish),
        "text": session.text.describe(),
        "calibration": session.calibration.describe() | {"tokens": protocol.tokens},
        "windows": protocol.windows,
        "other_windows": facts["others"],
        "window_tokens": WINDOW,
        "context": CONTEXT,
        "new_tokens": NEW_TOKENS,
        "dtype": facts["dtype"],
        "device": session.device.type,
        "bandwidth": speed.value["bandwidth"] if speed and speed.value else None,
        "prompt": protocol.prompt,
        "tasks": described(protocol.tasks),
        "seed": protocol.seed,
        "caveats": caveats,
        "identity": session.identity,
    }


def _save(comparison: Comparison, folder: Path, session: Session, plan: Sequence[Configuration]) -> None:
    comparison.save(folder)
    write_text(folder / TABLES, markdown.render(comparison))
    advice = comparison.recommendation
    if advice is not None and (chosen := _of(plan, advice.label)).recipe is not None:
        session.profile(chosen).save(folder / PROFILE, overwrite=True)
