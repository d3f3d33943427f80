"""Cores that other processes take: waiting that spares them, and a word about them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STAT = Path("/proc/stat")
# Turns of a thread that waits for work, before it sleeps: as quick as the milliseconds that GNU's OpenMP spins for
# itself where cores are free, and about twice as quick beside a busy process.
SPINS = "1000"
# What others may take of all cores without being mentioned, and how long to look, in seconds.
SHARE = 0.1
LEAST = 3.0


def wait_briefly() -> None:
    """Bound how long torch's threads spin, unless the user has said it; to be called before torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # of the OpenMP of LLVM and Intel, in ms


class Watch:
    """What other processes take from its making on."""

    def __init__(self) -> None:
        self._started, self._before = time.monotonic(), _others_s()

    def taken(self) -> float | None:
        """Return the cores that others kept busy, on average; None where the system does not say, or for a moment."""
        seconds, now = time.monotonic() - self._started, _others_s()
        if now is None or self._before is None or seconds < LEAST:
            return None
        return max(0.0, (now - self._before) / seconds)

    def remark(self) -> str | None:
        """Return what to say about it, None where torch's threads had their cores."""
        taken, cores, torch = self.taken(), os.cpu_count() or 1, sys.modules.get("torch")
        if torch is None or taken is None or taken < SHARE * cores or taken + torch.get_num_threads() <= cores:
            return None
        return f"other processes kept {taken:.1f} of {cores} cores busy: this ran slower than alone, and speeds swing."


def _others_s() -> float | None:
    """Return the seconds of all cores that were not idle, without those of this process."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().split(maxsplit=9)[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()
