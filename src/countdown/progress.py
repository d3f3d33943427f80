"""Progress of long work, on stderr, and how long it will take: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from statistics import fmean
from typing import TypeVar

# Seconds between plain lines.
BETWEEN_LINES = 10.0
T = TypeVar("T")


class Steps:
    """How far along work is, and how long the rest of it takes: each step what others of its kind took so far.

    Args:
        kinds: Of each step, in any order: what makes it long or short.
        sizes: Of some kinds, how long a step of it takes compared with others, for as long as none was seen. [1]
    """

    def __init__(self, kinds: Sequence[Hashable], sizes: Mapping[Hashable, float] | None = None) -> None:
        self.left, self.done, self._sizes = list(kinds), 0, sizes or {}
        self._took: dict[Hashable, list[float]] = {}

    @contextmanager
    def step(self, kind: Hashable) -> Iterator[None]:
        """Within the context, a step is done; it counts however it ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._took.setdefault(kind, []).append(time.perf_counter() - started)
            self.left.remove(kind)
            self.done += 1

    @property
    def seconds(self) -> float | None:
        """What the steps left will take, in s; None before the first is done."""
        if not self._took:
            return None
        usual = fmean(fmean(took) / self._sizes.get(kind, 1.0) for kind, took in self._took.items())
        unseen = {kind: usual * self._sizes.get(kind, 1.0) for kind in self.left}
        return sum(fmean(self._took.get(kind, [unseen[kind]])) for kind in self.left)

    def __str__(self) -> str:
        left = "" if self.seconds is None else f", {about(self.seconds)} left"
        return f"{self.done + 1} of {self.done + len(self.left)}{left}"


def about(seconds: float) -> str:
    """Return a time as people say it: about 40 s, about 6 min, about 2.5 h."""
    if seconds < 100:
        return f"about {max(round(seconds), 1)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 100 * 60 else f"about {seconds / 3600:.1f} h"


def track(items: Iterable[T], description: str, *, show: bool = True, still: bool = False) -> Iterator[T]:
    """Yield `items`, showing how far along they are and how long the rest will take.

    Args:
        items: They must have a length.
        description: What is done with them.
        show: Show it.
        still: For what is timed: a bar moves between items alone, by no thread that would take time from them, and
            lines come only where it takes long.
    """
    assert isinstance(items, Sized)
    if not show:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, TextColumn("left"), console=console, transient=True, auto_refresh=not still) as bar:
            yield from bar.track(items, description=description)
    else:
        yield from _plain(items, len(items), description, framed=not still)


def _plain(items: Iterable[T], total: int, description: str, *, framed: bool) -> Iterator[T]:
    """Yield items, printing now and then; if `framed`, a line before the first and one after the last, too."""
    started = said = time.perf_counter()
    if framed:
        say(f"{description}: {total} steps")
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - said >= BETWEEN_LINES:
            said = now
            say(f"{description}: {done} of {total}, {about((now - started) / done * (total - done))} left")
        yield item
    if framed:
        say(f"{description}: done")


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
