"""The backend of CPUs: calls of the C++ library."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from countdown.ops.base import Gathering, by_rank
from countdown.ops.call import TENSORS, Call
from countdown.ops.cpu import dense_ops, library
from countdown.ops.cpu.library import ACTIVATIONS, DECIDERS, DTYPES, FORMATS, MatrixView, SumCall
from countdown.ops.request import requested
from countdown.sums import Sum
from countdown.weights import Plain, Weight
from countdown.weights.int4 import Int4ByColumn, Int4ByRow
from countdown.weights.symmetric import Symmetric4

# Forms of calls that are kept: shapes times numbers of tokens, of which a model has few.
_MOST_FORMS = 1024
_NAMES = ("kind", "activation", "selector", "rule", "drop", "compensation")


class CPU(Gathering):
    """See `ops.cpu`."""

    name, device, key, runs_on = "cpu", "cpu", "CPU", "CPUs"
    selectors = MappingProxyType({"ffn": ("up", "gate", "coefficient", "proxy-4"), "linear": ("input",)})
    compensations = MappingProxyType({"ffn": ("affine",), "linear": ("svd",)})
    formats = (Plain.format, Int4ByRow.format, Int4ByColumn.format)

    def __init__(self) -> None:
        # By what `_form_of` says of a call: the C call without addresses.
        self._forms: dict[Hashable, SumCall] = {}

    def missing(self) -> str | None:
        """See `Backend.missing`."""
        return library.missing()

    def step_ops(self) -> Mapping[str, Callable[..., Any]]:
        """See `Backend.step_ops`."""
        return {"project": dense_ops.project, "attend_one": dense_ops.attend_one}

    def lay_out(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Sequence[Weight], Sequence[Weight]]:
        """W_down by neuron, a linear by input channel, proxies in tiles."""
        *others, down = sum_.weights
        return [*others, down.by_column()], [_in_tiles(part) for part in parts]

    def again(self, op: str, args: tuple[Any, ...], names: dict[str, Any]) -> Tensor | None:
        """See `Backend.again`."""
        form = self._forms.get(_form_of(op, args, names))
        return None if form is None else _done(form, op, *args)

    def run(self, call: Call) -> Tensor:
        """See `Backend.run`."""
        parts = [_in_tiles(part) for part in call.parts]
        args: tuple[Any, ...] = (
            call.x.contiguous(),
            [
                *(weight.parts[0] for weight in call.sum.weights),
                *_contiguous(t for part in parts for t in part.parts),
                *_added(call),
            ],
            [bias if bias is None or bias.dtype in DTYPES else bias.float() for bias in _contiguous(call.sum.biases)],
            *_contiguous(getattr(call, name) for name in TENSORS[call.op]),
        )
        names: dict[str, Any] = {"kind": call.sum.kind, "activation": call.sum.activation}
        names["formats"] = [weight.format for weight in (*call.sum.weights, *parts, *map(_in_tiles, call.added))]
        if call.compensation is not None:
            names["compensation"] = call.compensation.name
        if call.selector is not None:
            names |= {"selector": call.selector.name, "rule": call.rule, "drop": call.drop}
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
        # As it is read: a call that must be put into this form first is not known again.
        form = self._forms[_form_of(call.op, args, names)] = _described(call, *args[:3])
        return _done(form, call.op, *args)


def _form_of(op: str, args: tuple[Any, ...], names: dict[str, Any]) -> Hashable:
    """Return all that checks, refusals and the C call depend on, which is all but addresses."""
    x, weights, biases, *tensors = args
    return (
        op, requested(), len(weights), *names["formats"], *map(names.get, _NAMES),
        *[t if t is None else (t.shape, t.stride(), t.dtype) for t in (x, *weights, *biases, *tensors)],
    )  # fmt: skip


def _described(call: Call, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> SumCall:
    """Return a call without its addresses."""
    form = SumCall(
        dtype=DTYPES[x.dtype],
        tokens=call.tokens,
        d=x.shape[-1],
        h=call.terms,
        outputs=call.sum.outputs,
        activation=ACTIVATIONS[call.sum.activation],
    )
    views = _views(form, len(biases))
    for view, weight, tensor, bias in zip(views, call.sum.weights, weights, biases, strict=False):
        # A plain W_down is a view of a matrix with a neuron a row, a packed one is that matrix.
        along = tensor.stride(1 if view is views[-1] and weight.format == Plain.format else 0)
        view.format, view.stride = FORMATS[weight.format, tensor.dtype], along * tensor.itemsize
        view.bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
    # What is known of an input channel without a selector, its coefficient, no FFN knows of a neuron.
    by = call.selector.name if call.selector else "input" if call.sum.kind == "linear" else None
    form.decision.by, form.decision.looks = DECIDERS[by], call.looks
    if call.parts:
        levels, scales = weights[3:5]
        form.decision.words, form.decision.groups = levels.shape[1], scales.shape[1]
    if call.compensation is not None:
        _describe_added(form, call, weights)
    return form


def _describe_added(form: SumCall, call: Call, weights: Sequence[Tensor]) -> None:
    if call.sum.kind == "ffn":
        levels, scales, *_ = weights[-4:]
        form.affine.words, form.affine.groups = levels.shape[1], scales.shape[1]
        return
    form.added.rank = call.added[0].shape[0]
    for view, tensor, along in zip((form.added.inner, form.added.outer), weights[-2:], (1, 0), strict=True):
        view.format, view.stride = FORMATS["plain", tensor.dtype], tensor.stride(along) * tensor.itemsize


def _views(call: SumCall, count: int) -> tuple[MatrixView, ...]:
    """Return where the matrices of a sum stand in its call; the last is the one whose columns are summed."""
    return (call.gate, call.up, call.down)[-count:]


def _done(
    form: SumCall,
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *tensors: Tensor | None,
) -> Tensor:
    """Return the result of a call of a form, of tensors as kernels read them."""
    call = SumCall.from_buffer_copy(form)
    call.x = library.of_tokens(x, call.tokens)
    decision = call.decision
    for view, weight, bias in zip(_views(call, len(biases)), weights, biases, strict=False):
        view.data = weight.data_ptr()
        if bias is not None:
            view.bias = bias.data_ptr()
    if decision.words:
        for view, levels, scales in zip((decision.gate, decision.up), weights[3:7:2], weights[4:7:2], strict=True):
            view.levels, view.scales = levels.data_ptr(), scales.data_ptr()
    _point_to_added(call, weights)
    for name, tensor in zip(TENSORS[op], tensors, strict=True):
        if tensor is not None:
            setattr(call if name == "counters" else decision, name, tensor.data_ptr())
            if name == "per_term" and tensor.dim() == 2:
                decision.second = tensor.data_ptr() + tensor.nbytes // 2
    result = _result(call, op, x)
    library.library().run(call, [x, *weights, *biases, *tensors, result], weights=call.h * call.outputs)
    return result


def _point_to_added(call: SumCall, weights: Sequence[Tensor]) -> None:
    """Give a call the addresses of what a compensation keeps, if it has one."""
    if call.affine.words:
        matrix = call.affine.matrix
        matrix.levels, matrix.scales, call.affine.channels, call.affine.bias = (t.data_ptr() for t in weights[-4:])
    if call.added.rank:
        call.added.inner.data, call.added.outer.data = (tensor.data_ptr() for tensor in weights[-2:])


def _result(call: SumCall, op: str, x: Tensor) -> Tensor:
    """Return an empty result, which the call has the address of."""
    if op == "select":
        result = x.new_empty((*x.shape[:-1], call.h), dtype=torch.bool)
        call.selected = result.data_ptr()
    else:
        same = call.outputs == call.d  # `empty_like` is faster
        result = torch.empty_like(x) if same else x.new_empty((*x.shape[:-1], call.outputs))
        call.y = library.of_tokens(result, call.tokens)
    return result


def _contiguous(tensors: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    """Yield tensors that kernels can index: biases of interleaved rows are strided."""
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def _added(call: Call) -> Iterator[Tensor | None]:
    """Yield the tensors of a compensation as kernels read them."""
    if call.sum.kind == "linear":
        yield from by_rank(call.added)
    else:
        yield from _contiguous(tensor for part in call.added for tensor in _in_tiles(part).parts)


def _in_tiles(part: Weight) -> Weight:
    return part.in_tiles() if isinstance(part, Symmetric4) else part
