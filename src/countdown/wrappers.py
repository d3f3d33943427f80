"""What people put around a model."""

from __future__ import annotations

from torch import nn


def base_model(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside a PEFT model; any other model as it is."""
    inner = getattr(model, "get_base_model", None)
    found: nn.Module = inner() if callable(inner) else model
    return found
