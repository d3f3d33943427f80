"""The dense ops of a decode step in CPU kernels: every variant that this machine runs."""

from __future__ import annotations

import pytest
import torch

import kernel_cases as cases
import oracle
from countdown.ops import dense
from countdown.ops.cpu import dense_ops, library
from crossing import crossed

if library.missing():
    pytest.skip(f"no CPU kernels: {library.missing()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("variant")


@crossed(d=[1, 37, 2048], heights=[(1,), (64, 16), (37, 5, 41)], bias=[(), (0, 2)], dtype=cases.TOLERANCE)
def test_project_one(d, heights, bias, dtype, threads):
    weights = [cases.inputs(h, d, dtype, "cpu", h) for h in heights]
    biases = [cases.inputs(1, h, dtype, "cpu", 7 + h)[0] if place in bias else None for place, h in enumerate(heights)]
    x = cases.inputs(1, d, dtype, "cpu", 0)
    with cases.poisoned():
        y = dense_ops.project(x, weights, biases)
    expected = [
        weight.double() @ x[0].double() + (0 if some is None else some.double())
        for weight, some in zip(weights, biases, strict=True)
    ]
    assert oracle.relative_error(y[0], torch.cat(expected)) <= cases.TOLERANCE[dtype]


@crossed(
    tokens=[2, 3, 5, 8],
    d=[1, 37, 2048],
    heights=[(1,), (64, 16), (37, 5, 41)],
    bias=[(), (0, 2)],
    dtype=cases.TOLERANCE,
)
def test_tokens_of_a_product_are_each_as_alone(tokens, d, heights, bias, dtype, threads):
    weights = [cases.inputs(h, d, dtype, "cpu", h) for h in heights]
    biases = [cases.inputs(1, h, dtype, "cpu", 7 + h)[0] if place in bias else None for place, h in enumerate(heights)]
    x = cases.inputs(tokens, d, dtype, "cpu", 0)
    with cases.poisoned():
        y = dense_ops.project(x, weights, biases)
    assert torch.equal(y, torch.cat([dense_ops.project(one[None], weights, biases) for one in x]))


@crossed(
    shape=[(1, 1, 1, 1), (4, 4, 70, 16), (12, 2, 2000, 64), (24, 1, 130, 40)],
    mask=["none", "some", "first", "last"],
    dtype=cases.TOLERANCE,
)
def test_attend_one(shape, mask, dtype, threads):
    heads, groups, length, size = shape
    q = cases.inputs(heads, size, dtype, "cpu", 1).view(1, heads, 1, size)
    keys, values = (cases.inputs(groups * length, size, dtype, "cpu", s).view(1, groups, length, size) for s in (2, 3))
    seen = None
    if mask != "none":
        seen = (torch.rand(1, 1, 1, length) < 0.5) & torch.tensor(mask == "some")
        seen[..., -1 if mask == "last" else 0] = True
    with cases.poisoned():
        y = dense_ops.attend_one(q, keys, values, seen, 0.3)
    exact = [tensor.double() for tensor in (q, keys, values)]
    assert oracle.relative_error(y, dense.attend_one(*exact, seen, 0.3)) <= 2 * cases.TOLERANCE[dtype]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("keys_at", [slice(0, 1), slice(0, 1000), slice(0, 2000)], ids=["one", "half", "all"])
def test_attention_of_keys_that_are_not_finite_is_as_torchs(keys_at, value, threads):
    q = torch.ones(1, 2, 1, 64)
    keys, values = (cases.inputs(2000, 64, torch.float32, "cpu", s).view(1, 1, 2000, 64).clone() for s in (2, 3))
    keys[:, :, keys_at, 0] = value
    y = dense_ops.attend_one(q, keys, values, None, 0.3)
    torch.testing.assert_close(y, dense.attend_one(q, keys, values, None, 0.3), equal_nan=True)
