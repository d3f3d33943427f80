"""Dense ops of a decoding step: schemas, checks, fakes, and their reference, which rounds as torch does.

- `project`: x [T, d], one to 8 tokens, through one to three linears, weights [d_out_k, d], side by side:
  [T, Σ d_out_k].
- `gated`: of such x, act(W_gate x + b) · (W_up x + b), [T, h]; weights [h, d] of both, `activation` by name.
- `normalise`: RMS norm over the last dimension of x [..., d]; `rounded` to the dtype of x before the weight is
  multiplied in. `add_and_normalise`: (x + y, its norm).
- `attend_one`: q [1, heads, 1, size] attends to keys and values [1, groups, length, size], heads a multiple of groups,
  those that mask [1, 1, 1, length], bool, lets it see: [1, heads, 1, size].
- `attend_next`: puts key and value [1, groups, 1, size] into keys and values first, at the place that is the sum of
  `at`, integers with one entry; with `rotation`, cosines and sines with `size` entries each, q and key are rotated.
- `angles_one`: cosines and sines [2 n] of position · frequencies [n], twice, times `scale`, in the dtype of `like`;
  position is an integer with one entry.
- `largest_one`: the place [1, 1] of the largest of logits [1, n]: of NaN if there is one; of several the first.

`overlap`: what comes next in a stream may start while this waits, which is faster unless that is a sparse linear. No
value depends on it. Arguments that do not fit raise ValueError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.ops.base import MOST_TOKENS
from countdown.sums.activations import ACTIVATIONS
from countdown.sums.linear import Linear
from countdown.weights import Plain

Biases = list[Tensor | None]


def check_projections(x: Tensor, weights: list[Tensor], biases: Biases) -> None:
    """Raise ValueError unless tokens fit one to three linears."""
    if x.dim() != 2 or not 1 <= x.shape[0] <= MOST_TOKENS:
        raise ValueError(f"x is {tuple(x.shape)}, expected [T, d], 1 to {MOST_TOKENS} tokens")
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"weights has {len(weights)} tensors, expected 1 to 3")
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries, expected {len(weights)}")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dtype != x.dtype:
            raise ValueError(f"W is {weight.dtype}, expected {x.dtype} like x")
        Linear([Plain([weight])], [bias]).check(x)


def check_gated(x: Tensor, weights: list[Tensor], biases: Biases, activation: str) -> None:
    """Raise ValueError unless tokens fit a gate and an up projection."""
    check_projections(x, weights, biases)
    if len(weights) != 2 or weights[0].shape != weights[1].shape:
        raise ValueError(f"weights are {[tuple(weight.shape) for weight in weights]}, expected gate and up alike")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is '{activation}', expected one of {', '.join(ACTIVATIONS)}")


def check_norm(x: Tensor, y: Tensor | None, weight: Tensor) -> None:
    """Raise ValueError unless a weight fits what is normalised, and both summands each other."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}")
    if y is not None and (y.shape != x.shape or y.dtype != x.dtype):
        raise ValueError(f"y is {y.dtype} {tuple(y.shape)}, expected {x.dtype} {tuple(x.shape)} like x")


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


def check_next(keys: Tensor, key: Tensor, value: Tensor, rotation: list[Tensor], at: list[Tensor]) -> None:
    """Raise ValueError unless a new key and value fit those that are there."""
    _, groups, _, size = keys.shape
    for new in (key, value):
        if new.shape != (1, groups, 1, size) or new.dtype != keys.dtype:
            raise ValueError(f"a new key or value is {new.dtype} {tuple(new.shape)}, expected {(1, groups, 1, size)}")
    if len(rotation) not in (0, 2) or any(one.numel() != size or one.dtype != keys.dtype for one in rotation):
        raise ValueError(f"rotation does not fit, expected nothing or cosines and sines, {size} of {keys.dtype} each")
    if rotation and size % 2:
        raise ValueError(f"heads of {size} have no halves to rotate")
    if not 1 <= len(at) <= 2 or any(one.numel() != 1 or one.dtype != torch.int64 for one in at):
        raise ValueError("at does not fit, expected one or two int64 tensors with one entry")


def check_angles(position: Tensor, frequencies: Tensor) -> None:
    """Raise ValueError unless there is one position, and frequencies in float32."""
    if position.numel() != 1 or position.dtype != torch.int64:
        raise ValueError(f"position is {position.dtype} {tuple(position.shape)}, expected one int64")
    if frequencies.dim() != 1 or frequencies.dtype != torch.float32:
        raise ValueError(f"frequencies are {frequencies.dtype} {tuple(frequencies.shape)}, expected float32 [n]")


def check_logits(logits: Tensor) -> None:
    """Raise ValueError unless logits are those of one token."""
    if logits.dim() != 2 or len(logits) != 1 or not logits.numel():
        raise ValueError(f"logits are {tuple(logits.shape)}, expected [1, n]")


def project(x: Tensor, weights: list[Tensor], biases: Biases) -> Tensor:
    """Return tokens through several linears, `[T, Σ d_out]`."""
    check_projections(x, weights, biases)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=-1)


def gated(x: Tensor, weights: list[Tensor], biases: Biases, activation: str) -> Tensor:
    """Return the product of both projections of tokens, one of them activated, `[T, h]`."""
    check_gated(x, weights, biases, activation)
    gate, up = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return ACTIVATIONS[activation](gate) * up


def normalise(x: Tensor, weight: Tensor, eps: float, rounded: bool, overlap: bool = True) -> Tensor:
    """Return the RMS norm of x."""
    check_norm(x, None, weight)
    whole = x.float() if x.dtype != torch.float64 else x
    whole = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + eps)
    return weight * whole.to(x.dtype) if rounded else (whole * weight).to(x.dtype)


def add_and_normalise(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, rounded: bool, overlap: bool = True
) -> tuple[Tensor, Tensor]:
    """Return x + y and its RMS norm."""
    check_norm(x, y, weight)
    total = x + y
    return total, normalise(total, weight, eps, rounded)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of one token, `[1, heads, 1, size]`."""
    check_attention(q, keys, values, mask)
    _, heads, _, size = q.shape
    grouped = q.reshape(1, keys.shape[1], -1, size)
    scores = (grouped @ keys.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1).to(q.dtype) @ values).view(1, heads, 1, size)


def attend_next(
    q: Tensor, key: Tensor, value: Tensor, rotation: list[Tensor], keys: Tensor, values: Tensor, at: list[Tensor],
    mask: Tensor | None, scale: float, overlap: bool = True,
) -> Tensor:  # fmt: skip
    """Keep a token's key and value, and return its attention, `[1, heads, 1, size]`."""
    check_attention(q, keys, values, mask)
    check_next(keys, key, value, rotation, at)
    if rotation:
        q, key = (_rotated(one, *rotation) for one in (q, key))
    place = torch.stack([one.reshape(()) for one in at]).sum().view(1)
    keys.index_copy_(2, place, key)
    values.index_copy_(2, place, value)
    return attend_one(q, keys, values, mask, scale)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.view(-1) + torch.cat([-second, first], dim=-1) * sin.view(-1)


def angles_one(position: Tensor, frequencies: Tensor, scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, `[2 n]` each."""
    check_angles(position, frequencies)
    angles = (position.reshape(1).float() * frequencies).repeat(2)
    return (angles.cos() * scale).to(like.dtype), (angles.sin() * scale).to(like.dtype)


def largest_one(logits: Tensor) -> Tensor:
    """Return the place of the largest, `[1, 1]`."""
    check_logits(logits)
    return logits.argmax(dim=-1, keepdim=True)


def _project_fake(x: Tensor, weights: list[Tensor], biases: Biases) -> Tensor:
    check_projections(x, weights, biases)
    return x.new_empty((len(x), sum(len(weight) for weight in weights)))


def _gated_fake(x: Tensor, weights: list[Tensor], biases: Biases, activation: str) -> Tensor:
    check_gated(x, weights, biases, activation)
    return x.new_empty((len(x), len(weights[0])))


def _norm_fake(x: Tensor, weight: Tensor, eps: float, rounded: bool, overlap: bool = True) -> Tensor:
    check_norm(x, None, weight)
    return torch.empty_like(x)


def _add_fake(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, rounded: bool, overlap: bool = True
) -> tuple[Tensor, Tensor]:
    check_norm(x, y, weight)
    return torch.empty_like(x), torch.empty_like(x)


def _attend_fake(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    check_attention(q, keys, values, mask)
    return q.new_empty(q.shape)


def _next_fake(
    q: Tensor, key: Tensor, value: Tensor, rotation: list[Tensor], keys: Tensor, values: Tensor, at: list[Tensor],
    mask: Tensor | None, scale: float, overlap: bool = True,
) -> Tensor:  # fmt: skip
    check_next(keys, key, value, rotation, at)
    return _attend_fake(q, keys, values, mask, scale)


def _angles_fake(position: Tensor, frequencies: Tensor, scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
    check_angles(position, frequencies)
    size = 2 * len(frequencies)
    return like.new_empty(size), like.new_empty(size)


def _largest_fake(logits: Tensor) -> Tensor:
    check_logits(logits)
    return logits.new_empty((1, 1), dtype=torch.int64)


# Schema, fake and reference, by name.
OPS = {
    "project": ("(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor", _project_fake, project),
    "gated": (
        "(Tensor x, Tensor[] weights, Tensor?[] biases, str activation) -> Tensor",
        _gated_fake,
        gated,
    ),
    "normalise": (
        "(Tensor x, Tensor weight, float eps, bool rounded, bool overlap=True) -> Tensor",
        _norm_fake,
        normalise,
    ),
    "add_and_normalise": (
        "(Tensor x, Tensor y, Tensor weight, float eps, bool rounded, bool overlap=True) -> (Tensor, Tensor)",
        _add_fake,
        add_and_normalise,
    ),
    "attend_one": (
        "(Tensor q, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor",
        _attend_fake,
        attend_one,
    ),
    "attend_next": (
        "(Tensor q, Tensor key, Tensor value, Tensor[] rotation, Tensor(a!) keys, Tensor(b!) values, Tensor[] at, "
        "Tensor? mask, float scale, bool overlap=True) -> Tensor",
        _next_fake,
        attend_next,
    ),
    "angles_one": (
        "(Tensor position, Tensor frequencies, float scale, Tensor like) -> (Tensor, Tensor)",
        _angles_fake,
        angles_one,
    ),
    "largest_one": ("(Tensor logits) -> Tensor", _largest_fake, largest_one),
}
