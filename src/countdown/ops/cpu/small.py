"""Small operations of torch as calls of the library, for steps that do hundreds of them: norms, rotations, residuals.

torch takes a microsecond or two for each, of which the work on a token is a tenth.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from countdown.ops.cpu.library import ACTIVATIONS, DTYPES, INT64, Ran, SmallCall, TensorView

COPY, ADD, MULTIPLY, NEGATE, SQUARE, INVERSE_ROOT, MEAN, ACTIVATE, LARGEST = range(9)
_DIMENSIONS = 4
_UNARY = {"aten::neg": NEGATE, "aten::rsqrt": INVERSE_ROOT, "aten::silu": ACTIVATE, "aten::relu": ACTIVATE}
_ADDING = ("aten::add", "aten::add_")
_BINARY = {**dict.fromkeys(_ADDING, ADD), "aten::mul": MULTIPLY}
_COPYING = ("aten::_to_copy", "aten::clone", "aten::copy_")


def small_calls(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> list[Ran]:
    """Return what does again what an operation did, nothing where it is not one of the small ones.

    Args:
        name: The operation's, such as `aten::mul`.
        args, kwargs: What it was given.
        made: What it returned, where the result goes.
    """
    tensors = [x for x in (made, *args) if isinstance(x, Tensor)]
    if name == "aten::cat":
        tensors = [made, *args[0]]
    if name == "aten::index_copy_":
        tensors = [made, args[3]]
    if not all(_fits(x) for x in tensors) or len({x.dtype == torch.int64 for x in tensors}) > 1:
        return []
    if tensors[0].dtype == torch.int64 and name not in _ADDING:
        return []
    for names, calls in _KNOWN:
        if name in names:
            return [Ran.of(call, 1, [*tensors, *_index(name, args)]) for call in calls(name, args, kwargs, made)]
    return []


def _index(name: str, args: Sequence[Any]) -> Sequence[Tensor]:
    return args[2:3] if name == "aten::index_copy_" else ()


def _fits(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and (tensor.dtype in DTYPES or tensor.dtype == torch.int64)
        and tensor.device.type == "cpu"
        and tensor.dim() <= _DIMENSIONS
    )


def _unary(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    activation = ACTIVATIONS.get(name.removeprefix("aten::"), 0)
    return [_call(_UNARY[name], made, args[0], activation=activation)]


def _binary(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    one, other = args
    exact = isinstance(other, Tensor | float) or abs(other) < 2**53  # as the double that it becomes
    if kwargs or not isinstance(one, Tensor) or not exact:
        return []
    return [_call(_BINARY[name], made, one, other)]


def _power(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    return [_call(SQUARE, made, args[0])] if args[1] == 2 else []


def _mean(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    x, dimensions, *keep = args
    if kwargs or list(dimensions) not in ([-1], [x.dim() - 1]) or keep != [True]:
        return []
    return [_call(MEAN, made.expand(x.shape), x)]


def _largest(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    x, dimensions, *_ = args
    if kwargs or len(args) != 2 or not x.dim() or list(dimensions) not in ([-1], [x.dim() - 1]):
        return []
    return [_call(LARGEST, made.unsqueeze(-1).expand(x.shape), x)]


def _gelu(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    which = "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"
    return [_call(ACTIVATE, made, args[0], activation=ACTIVATIONS[which])]


def _copied(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    return [_call(COPY, made, args[1] if name == "aten::copy_" else args[0])]


def _joined(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    parts, dimension = args[0], args[1] if len(args) > 1 else 0
    places = made.split([part.shape[dimension] for part in parts], dimension)
    return [_call(COPY, place, part) for place, part in zip(places, parts, strict=True)]


def _placed(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Tensor) -> list[SmallCall]:
    whole, dimension, index, source = args
    if index.numel() != 1 or index.dtype != torch.int64:
        return []
    call = _call(COPY, whole.narrow(dimension, 0, 1), source)
    call.at, call.at_stride, call.at_limit = index.data_ptr(), whole.stride(dimension), whole.shape[dimension]
    return [call]


_KNOWN: list[tuple[Any, Callable[[str, Sequence[Any], dict[str, Any], Any], list[SmallCall]]]] = [
    (_UNARY, _unary),
    (_BINARY, _binary),
    (("aten::pow",), _power),
    (("aten::mean",), _mean),
    (("aten::amax",), _largest),
    (("aten::gelu",), _gelu),
    (_COPYING, _copied),
    (("aten::cat",), _joined),
    (("aten::index_copy_",), _placed),
]


def _call(operation: int, result: Tensor, first: Tensor, second: Tensor | float = 0.0, *, activation: int = 0) -> Any:
    shape = result.shape
    sizes = (ctypes.c_int64 * _DIMENSIONS)(*[1] * (_DIMENSIONS - len(shape)), *shape)
    call = SmallCall(operation, activation, sizes, _view(result, shape), _view(first, shape))
    if isinstance(second, Tensor):
        call.second = _view(second, shape)
    else:
        call.value = second
    return call


def _view(tensor: Tensor, shape: torch.Size) -> TensorView:
    strides = tensor.expand(shape).stride()
    padded = (ctypes.c_int64 * _DIMENSIONS)(*[0] * (_DIMENSIONS - len(strides)), *strides)
    return TensorView(tensor.data_ptr(), DTYPES.get(tensor.dtype, INT64), padded)
