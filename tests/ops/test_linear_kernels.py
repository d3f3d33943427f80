"""The kernels of sparse linears: Triton's, in its interpreter where there is no GPU, and those of the CPU."""

from __future__ import annotations

import pytest
import torch

import kernel_cases as cases
from calls import CPU, REFERENCE, TRITON
from countdown.ops.base import MOST_TOKENS
from countdown.ops.call import Call
from countdown.ops.cpu import library
from countdown.phase import GENERATED, PADDING, PROMPT
from countdown.sums.linear import Linear
from countdown.weights import Plain
from crossing import crossed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (3, 130), (64, 16), (65, 33), (200, 91), (577, 70), (128, 2100)]
HOW = {"decision": "threshold", "drop": 0, "indicator": "input"}


VARIANTS = [] if library.missing() else library.library().variants


@pytest.fixture(params=["triton", *VARIANTS])
def where(request):
    """A backend and its device; of CPUs each variant that this machine runs."""
    if request.param == "triton":
        pytest.importorskip("triton")
        yield TRITON, DEVICE
        return
    library.library().take_variant(request.param)
    yield CPU, "cpu"
    library.library().take_variant(VARIANTS[0])


@crossed(shape=SHAPES, dtype=cases.TOLERANCE, tokens=[1, 2, 5, 8], share=[0.0, 0.5, 0.95], bias=[False, True])
def test_against_float64(where, shape, dtype, tokens, share, bias):
    ops, device = where
    cases.check_linear(tokens, *shape, dtype, device, share=share, bias=bias, seed=sum(shape), ops=ops)


@crossed(shape=SHAPES, rank=[0, 1, 7, 33, 130], dtype=cases.TOLERANCE, tokens=[1, 2, 5, 8], share=[0.0, 0.5, 0.95])
def test_a_low_rank_for_dropped_channels(where, shape, rank, dtype, tokens, share):
    ops, device = where
    cases.check_linear(tokens, *shape, dtype, device, share=share, bias=rank % 2 == 1, seed=rank, ops=ops, rank=rank)


@crossed(dtype=cases.TOLERANCE, weight_dtype=cases.TOLERANCE, tokens=[1, 3])
def test_weights_of_another_dtype(where, dtype, weight_dtype, tokens):
    ops, device = where
    cases.check_linear(tokens, 70, 45, dtype, device, share=0.5, weight_dtype=weight_dtype, bias=True, ops=ops)


@pytest.mark.parametrize(
    "phases",
    [
        [GENERATED], [PROMPT], [PADDING], [PADDING, GENERATED], [PROMPT, GENERATED, PADDING],
        [PROMPT, GENERATED, GENERATED, PADDING, GENERATED, PADDING, PROMPT, GENERATED],
    ],
)  # fmt: skip
def test_phases(where, phases):
    ops, device = where
    for rank in (None, 5):
        how = {"phases": phases, "bias": True, "ops": ops, "rank": rank}
        cases.check_linear(len(phases), 90, 40, torch.float32, device, share=0.6, **how)


@pytest.mark.parametrize("tokens", [1, 4])
def test_none_and_one_active(where, tokens):
    ops, device = where
    weight, bias = cases.linear(50, 21, torch.float32, device, bias=True)
    x = cases.inputs(tokens, 50, torch.float32, device, 0)
    counters, thresholds = torch.zeros(2, dtype=torch.int64, device=device), torch.full((50,), torch.inf, device=device)
    with cases.poisoned():
        none = ops.sparse_linear(x, weight, bias, thresholds, counters, **HOW)
    assert torch.equal(none, bias.expand(tokens, -1))
    assert counters.tolist() == [tokens, 0]
    thresholds[17] = -1
    with cases.poisoned():
        one = ops.sparse_linear(x, weight, bias, thresholds, counters, **HOW)
    torch.testing.assert_close(one, x[:, 17:18] * weight[:, 17] + bias)
    assert counters.tolist() == [2 * tokens, tokens]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("threshold", [0.4, torch.inf])
def test_a_token_that_is_not_finite_is_dense_and_alone(where, bad, threshold):
    ops, device = where
    weight, _ = cases.linear(130, 29, torch.float32, device)
    x = cases.inputs(3, 130, torch.float32, device, 1)
    thresholds = torch.full((130,), threshold, device=device)
    clean = ops.select_linear(x, weight, None, thresholds, **HOW)
    x[-1, 95] = bad
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    y = ops.sparse_linear(x, weight, None, thresholds, counters, **HOW)
    active = ops.select_linear(x, weight, None, thresholds, **HOW)
    assert active[-1].all()
    assert torch.equal(active[:-1], clean[:-1])
    expected = REFERENCE.sparse_linear(x, weight, None, thresholds, torch.zeros_like(counters), **HOW)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert not y[-1].isfinite().any()
    assert counters.tolist() == [3, int(active.sum())]


def test_a_nan_threshold_keeps_its_channel(where):
    # As in the reference: inactive only where the indicator is at most the threshold.
    ops, device = where
    weight, _ = cases.linear(20, 9, torch.float32, device)
    x = cases.inputs(1, 20, torch.float32, device, 1)
    thresholds = torch.full((20,), torch.inf, device=device)
    thresholds[3] = torch.nan
    assert ops.select_linear(x, weight, None, thresholds, **HOW).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_same_bits_every_time_and_whatever_stands_beside(where, tokens):
    ops, device = where
    weight, bias = cases.linear(300, 91, torch.bfloat16, device, bias=True)
    x = cases.inputs(tokens, 300, torch.bfloat16, device, 3)
    thresholds = torch.full((300,), 0.5, device=device)

    def run(x):
        counters = torch.zeros(2, dtype=torch.int64, device=device)
        return ops.sparse_linear(x, weight, bias, thresholds, counters, **HOW)

    first = run(x)
    assert all(torch.equal(run(x), first) for _ in range(5))


def test_leading_dimensions_and_strided_inputs(where):
    ops, device = where
    weight, bias = cases.linear(16, 24, torch.float32, device, bias=True)
    x = cases.inputs(4, 32, torch.float32, device, 3)[:, ::2].reshape(2, 2, 16)
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    thresholds = torch.full((16,), 0.6, device=device)
    y = ops.sparse_linear(x, weight, bias, thresholds, counters, **HOW)
    expected = REFERENCE.sparse_linear(x, weight, bias, thresholds, torch.zeros_like(counters), **HOW)
    assert y.shape == (2, 2, 24)
    torch.testing.assert_close(y, expected)


def test_a_weight_in_rows_goes_to_the_reference(where):
    ops, device = where
    weight = torch.randn(24, 16, device=device)
    x = cases.inputs(1, 16, torch.float32, device, 3)
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    thresholds = torch.full((16,), 0.6, device=device)
    y = ops.sparse_linear(x, weight, None, thresholds, counters, **HOW)
    assert torch.equal(y, REFERENCE.sparse_linear(x, weight, None, thresholds, torch.zeros_like(counters), **HOW))


def test_more_tokens_than_kernels_take_go_to_the_reference(where):
    ops, device = where
    cases.check_linear(MOST_TOKENS + 1, 40, 30, torch.float32, device, share=0.5, ops=ops)


@pytest.mark.parametrize("heights", [[20], [33, 7], [70, 24, 24]], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_together_in_one_launch(heights, tokens, monkeypatch):
    pytest.importorskip("triton")
    from countdown.ops.triton import linear
    from countdown.ops.triton.backend import Triton

    launched = []
    monkeypatch.setattr(linear, "_sum", lambda *args, _sum=linear._sum: launched.append(len(args[1])) or _sum(*args))
    own = Triton().step_ops()["sparse_together"]
    for ranks in (None, [19, 0, 1][: len(heights)]):
        cases.check_together(tokens, 150, heights, torch.float32, DEVICE, own, ranks)
    assert launched == [len(heights)] * 2


@pytest.mark.parametrize("heights", [[20], [33, 7], [70, 24, 24]], ids=str)
def test_together_as_torch_dispatches(heights):
    for ranks in (None, [19, 0, 1][: len(heights)]):
        cases.check_together(2, 150, heights, torch.float32, DEVICE, torch.ops.countdown.sparse_together, ranks)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"drops": [0]}, "are not those of 2 linears"),
        ({"formats": ["plain"] * 3}, "are not those of 2 linears"),
        ({"formats": ["plain"] * 2, "more": 1}, "tensors more"),
        ({"threshold": torch.float64}, "expected float32"),
    ],
)
def test_together_what_does_not_fit_is_said(change, said):
    weight, _ = cases.linear(8, 5, torch.float32, DEVICE)
    x = cases.inputs(1, 8, torch.float32, DEVICE, 0)
    thresholds = [torch.zeros(8, device=DEVICE, dtype=change.get("threshold", torch.float32))] * 2
    counters = [torch.zeros(2, dtype=torch.int64, device=DEVICE)] * 2
    with pytest.raises(ValueError, match=said):
        torch.ops.countdown.sparse_together(
            x, [weight] * (2 + change.get("more", 0)), [None] * 2, thresholds, counters,
            formats=change.get("formats", ["plain"] * 2), selector="input", rule="threshold",
            drops=change.get("drops", [0, 0]),
        )  # fmt: skip


def test_biases_of_different_dtypes_are_not_one_launch(monkeypatch):
    # A compiled kernel picks one of several pointers, which must be of one type; the interpreter would not mind.
    pytest.importorskip("triton")
    from countdown.ops.triton import linear
    from countdown.ops.triton.backend import Triton

    monkeypatch.setattr(linear, "run_together", None)
    x = cases.inputs(1, 30, torch.float32, DEVICE, 0)
    weights = [cases.linear(30, 8, torch.float32, DEVICE, seed=seed)[0] for seed in (0, 1)]
    biases = [torch.ones(8, device=DEVICE), torch.ones(8, device=DEVICE, dtype=torch.bfloat16)]
    counters = [torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in weights]
    y = Triton().step_ops()["sparse_together"](
        x, weights, biases, [torch.full((30,), -1.0, device=DEVICE)] * 2, counters,
        formats=["plain"] * 2, selector="input", rule="threshold", drops=[0, 0],
    )  # fmt: skip
    torch.testing.assert_close(y, torch.cat([x @ weight.T + 1 for weight in weights], dim=1))


def test_a_missing_bias_is_zeros_in_the_dtype_of_those_that_are_there(monkeypatch):
    pytest.importorskip("triton")
    from countdown.ops.triton import linear, linear_kernels

    given = []

    class Kept:
        def __getitem__(self, grid):
            return lambda *args, **names: given.append([bias.dtype for bias in args[8]])

    monkeypatch.setattr(linear_kernels, "finish", Kept())
    x = cases.inputs(1, 30, torch.float32, DEVICE, 0)
    weights = [cases.linear(30, 8, torch.bfloat16, DEVICE, seed=seed)[0] for seed in (0, 1)]
    sums = [
        Linear([Plain([weights[0]])], [torch.ones(8, device=DEVICE, dtype=torch.bfloat16)]),
        Linear([Plain([weights[1]])], [None]),
    ]
    calls = [Call("sparse", x, sum_) for sum_ in sums]
    linear._sum(x, calls, [torch.zeros(30, device=DEVICE)] * 2, None, None, None)
    assert given == [[torch.bfloat16] * 3]
