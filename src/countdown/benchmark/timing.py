"""Times on a CUDA device, by events around a captured graph, so that neither Python nor launches are counted; on a CPU,
by the clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from countdown.decoding import on_device, record
from countdown.errors import ConfigError
from countdown.progress import track

ROUNDS = 20
# Rounds before the first that counts.
WARM_UP = 3
# How long a captured graph is replayed before it is timed: clocks rise, and memory that was freed before is no longer
# being cleared.
WARM_UP_S = 0.05
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Rounds:
    """How many rounds count.

    Args:
        fewest: So many in any case, and as many again until enough is known.
        most: No more than that.
        most_s: None are added after so many seconds.
    """

    fewest: int = ROUNDS
    most: int = ROUNDS
    most_s: float = math.inf


def require_cuda() -> torch.device:
    """Return the CUDA device.

    Raises:
        ConfigError: There is none.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this benchmark measures kernels on a CUDA device, and torch sees none here.")
    return torch.device("cuda", torch.cuda.current_device())


def timed(step: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Return a call that does `step` once and returns its µs: captured and replayed on a CUDA device."""
    if device.type != "cuda":
        return _called(step)
    with on_device(device):
        return partial(_replay, _captured(step), step, device)


def in_turn(
    runs: Mapping[Name, Callable[[], float]],
    rounds: Rounds = Rounds(),
    *,
    warm_up: int = WARM_UP,
    enough: Callable[[Mapping[Name, list[float]]], bool] = lambda _: True,
    label: str = "",
) -> dict[Name, list[float]]:
    """Return what each run measured, round by round.

    A round goes through all runs, so what slows the machine for a while slows all of them, and ratios stay.

    Args:
        runs: By name; each measures once and returns what it found.
        rounds: How many count.
        warm_up: How many come before.
        enough: Whether what was measured so far will do.
        label: What is shown as progress on stderr; nothing if empty.
    """
    started = time.perf_counter()
    found = _rounds(runs, warm_up + rounds.fewest, label)
    found = {name: measured[warm_up:] for name, measured in found.items()}
    count = rounds.fewest
    while count < rounds.most and time.perf_counter() - started < rounds.most_s and not enough(found):
        more = min(rounds.fewest, rounds.most - count)
        for name, measured in _rounds(runs, more, label and f"{label}, again because it varies").items():
            found[name] += measured
        count += more
    return found


def _rounds(runs: Mapping[Name, Callable[[], float]], count: int, label: str) -> dict[Name, list[float]]:
    found: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in track(range(count), label, show=bool(label), still=True):
        for name, run in runs.items():
            found[name].append(run())
    return found


def _called(step: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started) * 1e6

    return once


def _captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = record(step)
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_UP_S:
        graph.replay()
        torch.cuda.synchronize()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, _: Callable[[], object], device: torch.device) -> float:
    """Return the µs of a replay.

    Args:
        graph: What to replay.
        _: The step it was captured from, which keeps alive the memory that the graph has the addresses of.
        device: Where.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with on_device(device):
        start.record()
        graph.replay()
        stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Bandwidth:
    """What memory gives.

    Args:
        copy: Bytes/s of an elementwise copy of 1 GiB, read and written bytes together.
        read: Bytes/s of a sum over 1 GiB.
        floor: The one that floors are computed with: on GPUs the copy, on CPUs, which read what they overwrite, the
            read.
    """

    copy: float
    read: float
    floor: float


# By type of device.
_FLOOR = {"cuda": "copy", "cpu": "read"}


def bandwidth(device: torch.device) -> Bandwidth:
    """Measure the memory bandwidth of a device.

    Raises:
        ConfigError: Neither a CUDA device nor a CPU: the clock would not see when it is done.
    """
    found = {kind: statistics.median(rates) for kind, rates in in_turn(_rates(device)).items()}
    return Bandwidth(**found, floor=found[_FLOOR[device.type]])


def floor_rate(device: torch.device) -> Callable[[], float]:
    """Return a call that measures once, in bytes/s, the bandwidth that floors are computed with.

    Raises:
        ConfigError: Neither a CUDA device nor a CPU.
    """
    return _rates(device)[_FLOOR[device.type]]


def _rates(device: torch.device) -> dict[str, Callable[[], float]]:
    if device.type not in _FLOOR:
        raise ConfigError(f"benchmarks run on {' and '.join(_FLOOR)}, and the device is {device.type}.")
    source = torch.ones(2**28, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    # Not copy_: in a graph that is a transfer by the copy engine, which is slower.
    copy, read = timed(lambda: torch.add(source, 1, out=target), device), timed(source.sum, device)
    size = source.nbytes
    return {"copy": lambda: 2 * size / copy() * 1e6, "read": lambda: size / read() * 1e6}


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Return ‖out − reference‖ / ‖reference‖, infinite for NaN."""
    norm = float(reference.norm()) or 1.0
    error = float((out.double() - reference).norm()) / norm
    return error if error == error else float("inf")
