"""Running out of memory, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from countdown.errors import ConfigError


@contextmanager
def memory_for(total: int) -> Iterator[None]:
    """Within the context proxies are made, of so many bytes in all.

    Raises:
        ConfigError: Memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Of a CPU torch raises a RuntimeError that says so.
        out = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not total or not out:
            raise
        raise ConfigError(
            f"memory ran out while making proxies, which take {total / 1e9:.2f} GB beside the weights: free some, or "
            "take a method without a proxy."
        ) from error
