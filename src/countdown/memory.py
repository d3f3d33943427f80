"""What passes over a text hold at once, and running out of memory, said in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from countdown.errors import AccidentError


def ran_out(error: Exception) -> bool:
    """Return whether an exception says that memory ran out."""
    # Of a CPU torch raises a RuntimeError that says so.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


# Bytes that a batch of a pass over a text may take beside the weights; see `batches`.
BATCH_BYTES = 2 << 30
# On a CPU the products of one usual window fill all cores, and larger batches only leave its caches.
CPU_TOKENS = 512
# Bytes of a term and token while a site is masked: factors, the indicator in float32, its bin, the active set.
TERM_BYTES = 32
# A softmax is taken in float32 over so many logits at a time: what a CPU's caches hold, elsewhere 256 MB for each copy.
CPU_LOGITS = 1 << 21
LOGITS = 1 << 26


def batches(sequences: Sequence[Tensor], device: torch.device, *, terms: int, logits: int = 0) -> list[Tensor]:
    """Return sequences in batches that run in one call, in their order.

    Neighbours of equal length share a batch as far as it takes no more than `BATCH_BYTES`, on a CPU no more than
    `CPU_TOKENS` tokens. A batch has at least one sequence.

    Args:
        sequences: Token ids, each int64 `[length]`.
        device: Where they will run.
        terms: How many terms the largest site has.
        logits: Bytes of the logits that are kept of a token.

    Returns:
        Token ids, each int64 `[sequences, length]`.
    """
    most = CPU_TOKENS if device.type == "cpu" else BATCH_BYTES // (logits + TERM_BYTES * terms)
    found: list[list[Tensor]] = []
    for sequence in sequences:
        length, last = len(sequence), found[-1] if found else []
        if last and len(last[0]) == length and (len(last) + 1) * length <= most:
            last.append(sequence)
        else:
            found.append([sequence])
    return [torch.stack(batch) for batch in found]


def logits_at_once(logits: Tensor) -> int:
    """Return over how many rows of logits `[..., vocabulary]` a softmax in float32 is taken at a time."""
    return max(1, (CPU_LOGITS if logits.is_cpu else LOGITS) // logits.shape[-1])


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a device has, those that are taken included."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows: as if there were no end to it
        return sys.maxsize
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    granted = limit.read_text(encoding="ascii").strip() if limit.exists() else ""
    most = int(granted) if granted.isdigit() else sys.maxsize
    return min(most, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@contextmanager
def memory_for(
    total: int, *, doing: str = "deriving weights", instead: str = "take a method that derives none"
) -> Iterator[None]:
    """Within the context something takes so many bytes in all.

    Args:
        total: The bytes.
        doing, instead: What takes them, and what does not, for the message.

    Raises:
        AccidentError: Memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not total or not ran_out(error):
            raise
        took = f"{total / 1e9:.2f} GB beside the model's"
        raise AccidentError(f"memory ran out while {doing}, which take {took}: free some, or {instead}.") from error
