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
        y = dense_ops.project(x, weights, biases)
    expected = [
        weight.double() @ x[0].double() + (0 if some is None else some.double())
        for weight, some in zip(weights, biases, strict=True)
    ]
    assert oracle.relative_error(y[0].cpu(), torch.cat(expected).cpu()) <= cases.tolerance(dtype)


@crossed(
    shape=[(1, 1, 1, 1), (4, 4, 70, 16), (12, 2, 200, 64), (24, 1, 130, 40), (2, 1, 9, 6)],
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


@crossed(
    d=[1, 37, 4096],
    h=[1, 91],
    bias=[(), (1,), (0, 1)],
    activation=["silu", "gelu_tanh", "relu", "linear"],
    dtype=cases.TOLERANCE,
)
def test_gated(d, h, bias, activation, dtype):
    weights = [cases.inputs(h, d, dtype, DEVICE, seed) / d**0.5 for seed in (1, 2)]
    biases = [cases.inputs(1, h, dtype, DEVICE, 7 + place)[0] if place in bias else None for place in range(2)]
    x = cases.inputs(1, d, dtype, DEVICE, 0)
    with cases.poisoned():
        y = dense_ops.gated(x, weights, biases, activation)
    exact = [[one if one is None else one.double() for one in some] for some in (weights, biases)]
    expected = dense.gated(x.double(), *exact, activation)
    assert oracle.relative_error(y.cpu(), expected.cpu()) <= 2 * cases.tolerance(dtype)


@pytest.mark.parametrize("tokens", [2, 8])
@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
def test_gated_of_several_tokens(tokens, dtype):
    weights = [cases.inputs(91, 37, dtype, DEVICE, seed) / 6 for seed in (1, 2)]
    biases = [cases.inputs(1, 91, dtype, DEVICE, 3)[0], None]
    x = cases.inputs(tokens, 37, dtype, DEVICE, 0)
    gate, up = (w.double() @ x.double().T for w in weights)
    expected = torch.nn.functional.silu(gate + biases[0].double()[:, None]) * up
    y = dense_ops.gated(x, weights, biases, "silu")
    assert oracle.relative_error(y.cpu(), expected.T.cpu()) <= 2 * cases.tolerance(dtype)


@crossed(shape=[(1, 1), (1, 1, 4096), (1, 3, 5, 37), (2, 96)], rounded=[True, False], dtype=cases.TOLERANCE)
def test_normalise(shape, rounded, dtype):
    x, y = (cases.inputs(1, torch.Size(shape).numel(), dtype, DEVICE, seed).view(shape) for seed in (0, 1))
    weight = cases.inputs(1, shape[-1], dtype if rounded else torch.float32, DEVICE, 2)[0]
    with cases.poisoned():
        norm = dense_ops.normalise(x, weight, 1e-5, rounded)
        sums, of_sums = dense_ops.add_and_normalise(x, y, weight, 1e-5, rounded)
    assert oracle.relative_error(sums.cpu(), (x + y).cpu()) <= cases.tolerance(dtype)
    for found, normalised in ((norm, x), (of_sums, x + y)):
        assert found.dtype == dtype
        expected = dense.normalise(normalised.double(), weight.double(), 1e-5, rounded)
        assert oracle.relative_error(found.cpu(), expected.cpu()) <= cases.tolerance(dtype)


def test_rows_that_are_views_are_normalised():
    whole = cases.inputs(6, 40, torch.float32, DEVICE, 0).view(1, 6, 40)
    rows, weight = whole[..., 3:19], torch.ones(16, device=DEVICE)
    found = dense_ops.add_and_normalise(rows, rows.flip(1), weight, 1e-5, True)
    for one, expected in zip(found, dense.add_and_normalise(rows, rows.flip(1), weight, 1e-5, True), strict=True):
        torch.testing.assert_close(one, expected)


@crossed(
    shape=[(2, 1, 9, 6), (4, 4, 70, 16), (12, 2, 200, 64), (24, 1, 130, 40), (2, 2, 5, 7)],
    at=[0, 3, "last"],
    rotation=[True, False],
    apart=[True, False],
    dtype=cases.TOLERANCE,
)
def test_attend_next(shape, at, rotation, apart, dtype):
    heads, groups, length, size = shape
    rotation = rotation and size % 2 == 0
    at = length - 1 if at == "last" else at
    q = cases.inputs(heads, size, dtype, DEVICE, 1).view(1, heads, 1, size)
    # As they come out of one product, a bit of it between them.
    new = cases.inputs(1, 2 * groups * size + 8, dtype, DEVICE, 2)[0]
    key, value = (new[first : first + groups * size].view(1, groups, 1, size) for first in (0, groups * size + 8))
    cache = [cases.inputs(groups * length, size, dtype, DEVICE, s).view(1, groups, length, size) for s in (3, 4)]
    angles = [cases.inputs(1, size, dtype, DEVICE, seed).view(1, 1, size) for seed in (5, 6)] if rotation else []
    mask = (torch.arange(length, device=DEVICE) <= at).view(1, 1, 1, length)
    places = [torch.tensor([at - 1 if apart else at], device=DEVICE), *([torch.tensor(1, device=DEVICE)] * apart)]
    exact = [[one.double() for one in some] for some in ([q, key, value], angles, cache)]
    expected = dense.attend_next(*exact[0], exact[1], *exact[2], places, mask, 0.3)
    with cases.poisoned():
        y = dense_ops.attend_next(q, key, value, angles, *cache, places, mask, 0.3)
    assert oracle.relative_error(y.cpu(), expected.cpu()) <= 2 * cases.tolerance(dtype)
    for kept, as_expected in zip(cache, exact[2], strict=True):
        assert oracle.relative_error(kept.cpu(), as_expected.cpu()) <= cases.tolerance(dtype)
        others = [place for place in range(length) if place != at]
        assert torch.equal(kept[:, :, others].double(), as_expected[:, :, others])


@pytest.mark.parametrize("n", [1, 1024, 3001])
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_largest_one(n, dtype):
    logits = cases.inputs(1, n, dtype, DEVICE, 0)
    assert dense_ops.largest_one(logits).tolist() == [[int(logits.argmax())]]
    logits[0, n // 2 :] = logits.max()  # of several the first
    assert dense_ops.largest_one(logits).tolist() == [[int(logits.argmax())]]
    for extreme in (float("inf"), float("nan"), -float("nan")):
        logits[0, n // 3] = extreme
        assert dense_ops.largest_one(logits).tolist() == [[n // 3]]
    assert dense_ops.largest_one(torch.full_like(logits, -float("inf"))).tolist() == [[0]]
    zeros = torch.zeros_like(logits)
    zeros[0, 0] = -0.0
    assert dense_ops.largest_one(zeros).tolist() == [[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(9, 8)}, "1 to 8 tokens"),
        ({"weights": [torch.ones(4, 8)] * 4, "biases": [None] * 4}, "expected 1 to 3"),
        ({"biases": []}, "biases has 0 entries, expected 1"),
        ({"weights": [torch.ones(4, 9)]}, "to fit W"),
    ],
)
def test_products_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dense.project(**{"x": torch.ones(1, 8), "weights": [torch.ones(4, 8)], "biases": [None]} | change)


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


NEXT = {
    "q": torch.ones(1, 4, 1, 8), "key": torch.ones(1, 2, 1, 8), "value": torch.ones(1, 2, 1, 8), "rotation": [],
    "keys": torch.ones(1, 2, 5, 8), "values": torch.ones(1, 2, 5, 8), "at": [torch.tensor([1])], "mask": None,
    "scale": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.ones(1, 2, 2, 8)}, "a new key or value is"),
        ({"value": torch.ones(1, 2, 1, 8).half()}, "a new key or value is torch.float16"),
        ({"rotation": [torch.ones(8)]}, "expected nothing or cosines and sines"),
        ({"rotation": [torch.ones(4), torch.ones(8)]}, "expected nothing or cosines and sines"),
        ({"at": []}, "one or two int64"),
        ({"at": [torch.tensor([1.0])]}, "one or two int64"),
    ],
)
def test_a_new_key_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dense.attend_next(**NEXT | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense.gated(torch.ones(1, 8), [torch.ones(4, 8)], [None], "silu"), "expected gate and up alike"),
        (lambda: dense.gated(torch.ones(1, 8), [torch.ones(4, 8)] * 2, [None] * 2, "sulu"), "expected one of silu"),
        (lambda: dense.normalise(torch.ones(1, 8), torch.ones(7), 0.1, True), "expected .8,."),
        (lambda: dense.add_and_normalise(torch.ones(1, 8), torch.ones(8), torch.ones(8), 0.1, True), "like x"),
        (lambda: dense.largest_one(torch.ones(2, 8)), "expected .1, n."),
    ],
)
def test_what_does_not_fit_a_step(call, message):
    with pytest.raises(ValueError, match=message):
        call()
