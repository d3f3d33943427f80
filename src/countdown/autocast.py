"""Computing outside of a caller's `torch.autocast`, which is global to its thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}  # and the dispatch key of each


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within the context, or in a function decorated with it, torch computes in the dtypes that tensors have."""
    with ExitStack() as stack:
        for device in DEVICES:
            # Only where it is on: asked to switch off what is not there, torch warns.
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
