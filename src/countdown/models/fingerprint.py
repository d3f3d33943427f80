"""Tells whether a profile belongs to a model: its structure exactly, its weights within dtype rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from countdown.models.ffn import GatedFFN

SAMPLES = 32
# bfloat16 rounds by at most 2⁻⁹ = 0.002; models trained further move by more than this.
WEIGHT_TOLERANCE = 0.01


def structure(model: nn.Module, ffns: Sequence[GatedFFN]) -> dict[str, Any]:
    """Return what must match exactly: the model's class and the place and shape of every FFN."""
    return {
        "class": type(model).__name__,
        "ffns": {ffn.name: {"d": ffn.d, "h": ffn.h, "activation": ffn.activation} for ffn in ffns},
    }


def weight_sample(ffn: GatedFFN) -> Tensor:
    """Return `SAMPLES` weights of each of gate, up and down at fixed places, float32 `[3, SAMPLES]`."""
    return torch.stack([_spread(linear.weight.detach()) for linear in ffn.linears])


def _spread(weight: Tensor) -> Tensor:
    # Along the diagonal of the grid, so that rows and columns both vary.
    rows = torch.linspace(0, weight.shape[0] - 1, SAMPLES, device=weight.device).long()
    columns = torch.linspace(0, weight.shape[1] - 1, SAMPLES, device=weight.device).long()
    return weight[rows, columns].float().cpu()


def weights_agree(ffns: Sequence[GatedFFN], samples: Mapping[str, Tensor]) -> bool:
    """Return whether the sampled weights equal those of the model up to dtype rounding."""
    for ffn in ffns:
        stored = samples[ffn.name]
        if (weight_sample(ffn) - stored).norm() > WEIGHT_TOLERANCE * stored.norm():
            return False
    return True
