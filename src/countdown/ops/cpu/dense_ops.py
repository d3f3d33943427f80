"""The dense ops of a decoding step on a CPU; see `ops.dense`."""

from __future__ import annotations

import ctypes

from torch import Tensor

from countdown.ops import dense as reference
from countdown.ops.base import contiguous
from countdown.ops.cpu.library import DTYPES, FORMATS, AttendCall, ProjectCall, library, of_tokens
from countdown.ops.dense import check_attention, check_projections
from countdown.ops.request import requested
from countdown.weights import Plain


def project(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """Return the products `[T, Σ d_out]`; see `ops.dense`. Those of a token are the same whatever others there are."""
    check_projections(x, weights, biases)
    if _is_for_reference(x) or any(weight.stride(1) != 1 and x.shape[1] > 1 for weight in weights):
        return reference.project(x, weights, biases)
    x, biases = x.contiguous(), contiguous(biases)
    heights = [len(weight) for weight in weights]
    y = x.new_empty((len(x), sum(heights)))
    addresses, integers = ctypes.c_void_p * 3, ctypes.c_int64 * 3
    call = ProjectCall(
        DTYPES[x.dtype], *x.shape, len(weights), FORMATS[Plain.format, x.dtype], of_tokens(x, len(x)),
        addresses(*(weight.data_ptr() for weight in weights)),
        integers(*heights),
        integers(*(weight.stride(0) * weight.itemsize for weight in weights)),
        addresses(*(None if bias is None else bias.data_ptr() for bias in biases)),
        of_tokens(y, len(x)),
    )  # fmt: skip
    library().run(call, [x, *weights, *biases, y], weights=sum(heights) * x.shape[1])
    return y


def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of one token `[1, heads, 1, size]`; see `ops.dense`."""
    check_attention(q, keys, values, mask)
    contiguous = all(tensor.stride(3) == 1 or tensor.shape[3] == 1 for tensor in (q, keys, values))
    if _is_for_reference(q) or not contiguous:
        return reference.attend_one(q, keys, values, mask, scale)
    _, heads, _, size = q.shape
    _, groups, length, _ = keys.shape
    mask = None if mask is None else mask.contiguous()
    y = q.new_empty((1, heads, 1, size))
    call = AttendCall(
        DTYPES[q.dtype], heads, groups, length, size, q.data_ptr(), keys.data_ptr(), values.data_ptr(),
        q.stride(1), keys.stride(1), keys.stride(2), values.stride(1), values.stride(2),
        None if mask is None else mask.data_ptr(), scale, y.data_ptr(),
    )  # fmt: skip
    library().run(call, [q, keys, values, mask, y], weights=groups * length * size)
    return y


def _is_for_reference(x: Tensor) -> bool:
    return x.dtype not in DTYPES or requested() == "reference"
