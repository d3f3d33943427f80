"""What people put around a model."""

from __future__ import annotations

from torch import nn

from countdown.errors import UnsupportedModelError


def check_model(model: object) -> None:
    """Raise UnsupportedModelError for what is no model at all, such as its name."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"the model is of type {type(model).__name__}, expected a causal language model of transformers; "
            "countdown.from_pretrained loads one."
        )


def base_model(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside a PEFT model; any other model as it is.

    Raises:
        UnsupportedModelError: It is no model at all.
    """
    check_model(model)
    inner = getattr(model, "get_base_model", None)
    found: nn.Module = inner() if callable(inner) else model
    return found
