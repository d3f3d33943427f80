"""The dense ops of decode loops: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases
import oracle
from countdown.ops import dense
from countdown.ops.triton import dense_ops
from crossing import crossed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@crossed(
    d=[1, 37, 4096],
    heights=[(1,), (91,), (64, 16), (37, 5, 41)],
    bias=[(), (1,), (0, 2)],
    dtype=cases.TOLERANCE,
)
def test_project_one(d, heights, bias, dtype):
    weights = [cases.inputs(h, d, dtype, DEVICE, h) for h in heights]
    biases = [cases.inputs(1, h, dtype, DEVICE, 7 + h)[0] if place in bias else None for place, h in enumerate(heights)]
    x = cases.inputs(1, d, dtype, DEVICE, 0)
    with cases.poisoned():
        y = dense_ops.project_one(x, weights, biases)
    expected = [
        weight.double() @ x[0].double() + (0 if some is None else some.double())
        for weight, some in zip(weights, biases, strict=True)
    ]
    assert oracle.relative_error(y[0].cpu(), torch.cat(expected).cpu()) <= cases.tolerance(dtype)


@crossed(
    shape=[(1, 1, 1, 1), (4, 4, 70, 16), (12, 2, 200, 64), (24, 1, 130, 40)],
    mask=["none", "some", "first", "last"],
    dtype=cases.TOLERANCE,
)
def test_attend_one(shape, mask, dtype):
    heads, groups, length, size = shape
    q = cases.inputs(heads, size, dtype, DEVICE, 1).view(1, heads, 1, size)
    keys, values = (cases.inputs(groups * length, size, dtype, DEVICE, s).view(1, groups, length, size) for s in (2, 3))
    seen = None
    if mask != "none":
        seen = torch.rand(1, 1, 1, length, device=DEVICE) < 0.5
        # One key alone, in the first or the last block: those of the others are hidden.
        seen &= torch.tensor(mask == "some", device=DEVICE)
        seen[..., -1 if mask == "last" else 0] = True
    with cases.poisoned():
        y = dense_ops.attend_one(q, keys, values, seen, 0.3)
    exact = [tensor.double() for tensor in (q, keys, values)]
    assert oracle.relative_error(y.cpu(), dense.attend_one(*exact, seen, 0.3).cpu()) <= 2 * cases.tolerance(dtype)


def test_attend_one_of_a_cache_that_is_a_view():
    q = cases.inputs(4, 16, torch.float32, DEVICE, 1).view(1, 1, 4, 16).transpose(1, 2)
    cache = cases.inputs(40, 32, torch.float32, DEVICE, 2).view(1, 40, 2, 16).transpose(1, 2)
    y = dense_ops.attend_one(q, cache, cache.flip(2), None, 1.0)
    exact = [q.double(), cache.double(), cache.flip(2).double()]
    assert oracle.relative_error(y.cpu(), dense.attend_one(*exact, None, 1.0).cpu()) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 8)}, "expected one token"),
        ({"weights": [torch.ones(4, 8)] * 4, "biases": [None] * 4}, "expected 1 to 3"),
        ({"biases": []}, "biases has 0 entries, expected 1"),
        ({"weights": [torch.ones(4, 9)]}, "to fit W"),
    ],
)
def test_products_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dense.project_one(**{"x": torch.ones(1, 8), "weights": [torch.ones(4, 8)], "biases": [None]} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.ones(1, 3, 5, 8), "values": torch.ones(1, 3, 5, 8)}, "heads a multiple of groups"),
        ({"q": torch.ones(2, 4, 1, 8)}, "expected .1, heads, 1, size."),
        ({"values": torch.ones(1, 2, 5, 8).half()}, "values torch.float16"),
        ({"mask": torch.ones(1, 1, 1, 4, dtype=torch.bool)}, "mask does not fit"),
    ],
)
def test_attention_that_does_not_fit(change, message):
    fitting = {"q": torch.ones(1, 4, 1, 8), "keys": torch.ones(1, 2, 5, 8), "values": torch.ones(1, 2, 5, 8)}
    with pytest.raises(ValueError, match=message):
        dense.attend_one(**{**fitting, "mask": None, "scale": 1.0} | change)
