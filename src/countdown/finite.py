"""What is said where a model computes NaN or infinity: why, and what to do."""

from __future__ import annotations

import torch
from torch import nn

from countdown.errors import CountdownError


def not_finite(what: str, model: nn.Module) -> CountdownError:
    """Return the error that says that something a model computed is not finite.

    Args:
        what: With its verb, such as `the logits are`.
        model: Whose weights are looked at.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.float().isfinite().all()):
            return CountdownError(
                f"{what} not finite: {name} holds NaN or infinity. The weights are damaged; get or make them again."
            )
    dtype = next(model.parameters()).dtype
    remedy = {
        torch.float16: "exceeds its range: load it in a wider dtype (--dtype bfloat16)",
        torch.bfloat16: "may need more digits: load it in float32 (--dtype float32)",
    }.get(dtype, "cannot be used on this text: its weights are finite, and there is no wider dtype")
    return CountdownError(f"{what} not finite in {str(dtype).removeprefix('torch.')}. The model {remedy}.")
