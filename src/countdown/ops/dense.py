"""Two dense ops of one token, for decode loops: schemas, checks, fakes, and their reference.

`project_one`: x [1, d] through one to three linears, weights [d_out_k, d], side by side: [1, Σ d_out_k]. `attend_one`:
q [1, heads, 1, size] attends to keys and values [1, groups, length, size], heads a multiple of groups, those that mask
[1, 1, 1, length], bool, lets it see: [1, heads, 1, size]. Arguments that do not fit raise ValueError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.sums.linear import Linear
from countdown.weights import Plain


def check_projections(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> None:
    """Raise ValueError unless one token fits one to three linears."""
    if x.dim() != 2 or x.shape[0] != 1:
        raise ValueError(f"x is {tuple(x.shape)}, expected one token [1, d]")
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"weights has {len(weights)} tensors, expected 1 to 3")
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries, expected {len(weights)}")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dtype != x.dtype:
            raise ValueError(f"W is {weight.dtype}, expected {x.dtype} like x")
        Linear([Plain([weight])], [bias]).check(x)


def check_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError unless one token's queries fit keys, values and mask."""
    if not (q.dim() == keys.dim() == 4 and keys.shape == values.shape):
        raise ValueError("q, keys or values have the wrong dimensions")
    (batch, heads, one, size), (rows, groups, length, keys_size) = q.shape, keys.shape
    if not (batch == rows == one == 1 and size == keys_size and heads % groups == 0):
        raise ValueError(
            f"q is {tuple(q.shape)} and keys are {tuple(keys.shape)}, expected [1, heads, 1, size] and "
            "[1, groups, length, size], heads a multiple of groups"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"keys are {keys.dtype}, values {values.dtype}, q {q.dtype}")
    if mask is not None and not (mask.shape == (1, 1, 1, length) and mask.dtype == torch.bool):
        raise ValueError(f"mask does not fit, expected bool {(1, 1, 1, length)}")


def project_one(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """Return one token through several linears, `[1, Σ d_out]`."""
    check_projections(x, weights, biases)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=-1)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of one token, `[1, heads, 1, size]`."""
    check_attention(q, keys, values, mask)
    _, heads, _, size = q.shape
    grouped = q.reshape(1, keys.shape[1], -1, size)
    scores = (grouped @ keys.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1).to(q.dtype) @ values).view(1, heads, 1, size)


def _project_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    check_projections(x, weights, biases)
    return x.new_empty((1, sum(len(weight) for weight in weights)))


def _attend_fake(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    check_attention(q, keys, values, mask)
    return q.new_empty(q.shape)


# Schema, fake and reference, by name.
OPS = {
    "project_one": ("(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor", _project_fake, project_one),
    "attend_one": (
        "(Tensor q, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor",
        _attend_fake,
        attend_one,
    ),
}
