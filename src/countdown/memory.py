"""Running out of memory, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from countdown.errors import ConfigError


def ran_out(error: Exception) -> bool:
    """Return whether an exception says that memory ran out."""
    # Of a CPU torch raises a RuntimeError that says so.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_for(total: int) -> Iterator[None]:
    """Within the context proxies are made, of so many bytes in all.

    Raises:
        ConfigError: Memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not total or not ran_out(error):
            raise
        raise ConfigError(
            f"memory ran out while making proxies, which take {total / 1e9:.2f} GB beside the weights: free some, or "
            "take a method without a proxy."
        ) from error
