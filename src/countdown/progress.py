"""Progress of long work, on stderr: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, show: bool = True) -> Iterator[T]:
    """Yield `items`, showing how far along they are. `items` must have a length."""
    assert isinstance(items, Sized)
    if not show:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, description, console=Console(stderr=True), transient=True)
    else:
        yield from _plain(items, len(items), description)


def _plain(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    reported = 0
    for done, item in enumerate(items):
        if done == 0 or done * 4 // total > reported:
            reported = done * 4 // total
            print(f"{description}: {done} of {total}", file=sys.stderr, flush=True)  # noqa: T201
        yield item
    print(f"{description}: done", file=sys.stderr, flush=True)  # noqa: T201
