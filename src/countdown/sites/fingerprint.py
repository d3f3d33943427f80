"""Tells whether a profile belongs to a model: its structure exactly, its weights within dtype rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from countdown.sites import Site
from countdown.weights import Weight

SAMPLES = 32
# bfloat16 rounds by at most 2⁻⁹ = 0.002; models trained further move by more than this.
WEIGHT_TOLERANCE = 0.01


def structure(model: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
    """Return what must match exactly: the model's class and the place, kind and shape of every site."""
    return {"class": type(model).__name__, "sites": {site.name: site.shape for site in sites}}


def weight_sample(site: Site) -> Tensor:
    """Return `SAMPLES` weights of each of the site's matrices at fixed places, float32 `[matrices, SAMPLES]`."""
    return torch.stack([_spread(weight) for weight in site.weights])


def _spread(weight: Weight) -> Tensor:
    # Along the diagonal of the grid, so that rows and columns both vary.
    rows, columns = (
        torch.linspace(0, size - 1, SAMPLES, device=weight.device, dtype=torch.float32).long() for size in weight.shape
    )
    return weight.some_rows(rows).gather(1, columns[:, None])[:, 0].float().cpu()


def weights_agree(sites: Sequence[Site], samples: Mapping[str, Tensor]) -> bool:
    """Return whether the sampled weights equal those of the model up to dtype rounding."""
    for site in sites:
        stored = samples[site.name]
        if (weight_sample(site) - stored).norm() > WEIGHT_TOLERANCE * stored.norm():
            return False
    return True
