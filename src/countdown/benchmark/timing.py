"""Times on a CUDA device, by events around a captured graph, so that neither Python nor launches are counted; on a CPU,
by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from countdown.decoding import record
from countdown.errors import ConfigError

REPLAYS = 20
# Replays before any is timed: clocks rise, and memory that was freed before is no longer being cleared.
WARM_UP_S = 0.05


def require_cuda() -> torch.device:
    """Return the CUDA device.

    Raises:
        ConfigError: There is none.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this benchmark measures kernels on a CUDA device, and torch sees none here.")
    return torch.device("cuda", torch.cuda.current_device())


def graph_time(step: Callable[[], object], replays: int = REPLAYS) -> float:
    """Return the median time of `step` in µs, captured and replayed."""
    graph = record(step)
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_UP_S:
        graph.replay()
        torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


def step_time(step: Callable[[], object], device: torch.device) -> float:
    """Return the median time of `step` in µs: captured and replayed on a CUDA device, called on another."""
    if device.type == "cuda":
        return graph_time(step)
    times: list[float] = []
    for _ in range(3 + REPLAYS):
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times[3:])


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


def bandwidth(device: torch.device) -> Bandwidth:
    """Measure the memory bandwidth of a device.

    Raises:
        ConfigError: Neither a CUDA device nor a CPU: the clock would not see when it is done.
    """
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"benchmarks run on cuda and cpu, and the device is {device.type}.")
    source = torch.ones(2**28, device=device)
    target = torch.empty_like(source)
    # Not copy_: in a graph that is a transfer by the copy engine, which is slower.
    copy = 2 * source.nbytes / step_time(lambda: torch.add(source, 1, out=target), device) * 1e6
    read = source.nbytes / step_time(source.sum, device) * 1e6
    return Bandwidth(copy, read, floor=copy if device.type == "cuda" else read)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Return ‖out − reference‖ / ‖reference‖, infinite for NaN."""
    norm = float(reference.norm()) or 1.0
    error = float((out.double() - reference).norm()) / norm
    return error if error == error else float("inf")
