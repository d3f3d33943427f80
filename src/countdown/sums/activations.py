"""The activations of gated FFNs that the ops know, by name: those of transformers' registry without parameters.

Entries of the registry that compute the same function (`gelu_new`, `gelu_fast`, ...) share a name here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "quick_gelu": lambda g: g * torch.sigmoid(1.702 * g),
    "gelu_10": lambda g: F.gelu(g).clip(-10, 10),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "laplace": lambda g: 0.5 * (1 + torch.erf((g - 0.707107) / (0.282095 * 2**0.5))),
    "sqrtsoftplus": lambda g: F.softplus(g).sqrt(),
    "linear": lambda g: g,
}
