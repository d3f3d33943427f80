"""The CPU kernels: every variant that this machine runs."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kernel_cases as cases
import oracle
from calls import CPU, DISPATCHED, REFERENCE, arguments
from countdown.errors import ConfigError
from countdown.ops import backends
from countdown.ops.cpu import dense_ops, library
from countdown.ops.cpu.small import small_calls
from countdown.phase import GENERATED, PADDING, PROMPT
from countdown.selectors import UP
from countdown.sums.gated import Gated
from countdown.weights import Plain
from crossing import crossed

if library.missing():
    pytest.skip(f"no CPU kernels: {library.missing()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("variant")
HOW = {"decision": "threshold", "drop": 0, "indicator": "up", "activation": "silu"}
NONE = [None, None, None]
CPU_ACTIVATIONS = [name for name in library.ACTIVATIONS if name]


def counted() -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int64)


def test_the_portable_variant_is_always_there(variant):
    assert library.library().variants[-1] == "portable"


@crossed(
    indicator=["up", "gate", "coefficient"],
    shape=[(1, 1), (3, 7), (65, 33), (577, 301)],
    dtype=cases.TOLERANCE,
    tokens=[1, 2, 5, 8],
)
def test_against_float64(indicator, shape, dtype, tokens):
    how = {"indicator": indicator, "activation": "silu", "share": 0.6, "bias": True, "ops": CPU}
    cases.check_sparse(tokens, *shape, dtype, "cpu", **how)


@crossed(
    indicator=["up", "gate"],
    shape=[(1, 1), (3, 7), (65, 33), (577, 301)],
    dtype=cases.TOLERANCE,
    shares=[(0.0, 0.0), (0.0, 0.5), (0.4, 0.6), (0.9, 0.95)],
    phases=[None, [PROMPT], [PADDING, GENERATED], [GENERATED, GENERATED, PADDING, PROMPT, GENERATED], [GENERATED] * 8],
)
def test_a_second_look_against_float64(indicator, shape, dtype, shares, phases):
    given = None if phases is None else torch.tensor(phases, dtype=torch.uint8)
    how = {"indicator": indicator, "activation": "silu", "shares": shares, "bias": True, "ops": CPU}
    cases.check_second_look(1 if phases is None else len(phases), *shape, dtype, "cpu", phases=given, **how)


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("activation", CPU_ACTIVATIONS)
def test_a_second_look_on_threads(activation, tokens, threads):
    how = {"indicator": "up", "activation": activation, "shares": (0.6, 0.7), "form": "fused", "ops": CPU}
    for dtype in (torch.float32, torch.bfloat16):
        cases.check_second_look(tokens, 576, 1536, dtype, "cpu", **how)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_second_look_at_a_token_that_is_not_finite_drops_nothing(bad):
    weights, biases = cases.ffn(64, 100, torch.float32, "cpu")
    x = cases.inputs(2, 64, torch.float32, "cpu", 1)
    thresholds, counters = torch.full((2, 100), torch.inf), torch.zeros(3, dtype=torch.int64)
    x[1, 5] = bad
    y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, **HOW)
    assert counters.tolist() == [2, 100, 100]
    assert not y[0].any()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("indicator", ["up", "gate"])
@pytest.mark.parametrize("shape", [(576, 1536), (640, 2048)], ids=str)
def test_shapes_of_real_models_on_threads(shape, indicator, threads):
    how = {"indicator": indicator, "activation": "silu", "share": 0.7, "ops": CPU}
    cases.check_sparse(1, *shape, torch.bfloat16, "cpu", **how)
    cases.check_proxy(2, *shape, torch.bfloat16, "cpu", activation="gelu_tanh", share=0.7, ops=CPU)


@crossed(
    by=["up", "gate", "coefficient", "proxy-4"],
    shape=[(1, 1), (3, 7), (65, 33), (577, 301), (200, 91)],
    dtype=cases.TOLERANCE,
    phases=[None, [PROMPT], [GENERATED, GENERATED, PADDING, PROMPT, GENERATED], [GENERATED] * 8],
)
def test_what_is_predicted_against_float64(by, shape, dtype, phases):
    tokens = 3 if phases is None else len(phases)
    cases.check_affine(tokens, *shape, dtype, "cpu", by=by, phases=phases, bias=True, ops=CPU)


@pytest.mark.parametrize("tokens", [1, 4])
def test_what_is_predicted_on_threads(tokens, threads):
    for shape in ((576, 1536), (200, 613)):
        cases.check_affine(tokens, *shape, torch.bfloat16, "cpu", by="up", ops=CPU)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shape", [(160, 911), (200, 613)], ids=str)
def test_threads_whose_ranges_end_within_a_tile(shape, tokens, threads):
    cases.check_proxy(tokens, *shape, torch.float32, "cpu", activation="silu", share=0.7, ops=CPU)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 33), (200, 91)], ids=str)
def test_proxies_against_float64(shape, dtype, tokens):
    how = {"activation": "gelu", "share": 0.6, "bias": True, "ops": CPU}
    cases.check_proxy(tokens, *shape, dtype, "cpu", **how)


@pytest.mark.parametrize("form", ["fused", "interleaved"])
@pytest.mark.parametrize("activation", backends.BACKENDS["cpu"].activations)
@pytest.mark.parametrize("share", [0.0, 0.95])
def test_activations_and_storage(share, activation, form):
    how = {"activation": activation, "share": share, "bias": True, "form": form, "ops": CPU}
    cases.check_sparse(2, 37, 91, torch.float32, "cpu", indicator="gate", **how)
    cases.check_proxy(1, 37, 91, torch.float32, "cpu", **how)


@pytest.mark.parametrize("tokens", [1, 4])
def test_none_and_one_active(tokens, threads):
    weights, biases = cases.ffn(21, 50, torch.float32, "cpu", bias=True)
    x = cases.inputs(tokens, 21, torch.float32, "cpu", 0)
    counters, thresholds = counted(), torch.full((50,), torch.inf)
    with cases.poisoned():
        none = CPU.sparse_ffn(x, weights, biases, thresholds, counters, **HOW)
    assert torch.equal(none, biases[2].expand(tokens, -1))
    assert counters.tolist() == [tokens, 0]
    thresholds[17] = -1
    with cases.poisoned():
        one = CPU.sparse_ffn(x, weights, biases, thresholds, counters, **HOW)
    active = torch.zeros(tokens, 50, dtype=torch.bool)
    active[:, 17] = True
    expected = oracle.combine(*oracle.projections(x, weights, biases, "silu"), active, weights, biases)
    assert oracle.relative_error(one, expected) <= 1e-5


@pytest.mark.parametrize("by", ["up", "gate", "coefficient", "proxy-4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", backends.BACKENDS["cpu"].activations)
def test_a_token_that_is_not_finite_is_dense_and_alone(activation, bad, by):
    weights, biases = cases.ffn(13, 29, torch.float32, "cpu")
    x = cases.inputs(3, 13, torch.float32, "cpu", 1)
    proxy = cases.proxy_of(weights) if by == "proxy-4" else None
    how = HOW | {"indicator": by, "activation": activation, "proxy": proxy}
    thresholds = torch.full((29,), 0.3)
    clean = CPU.select(x, weights, biases, thresholds, **how)
    x[-1, 5] = bad
    counters = counted()
    y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, **how)
    active = CPU.select(x, weights, biases, thresholds, **how)
    assert active[-1].all()
    assert torch.equal(active[:-1], clean[:-1])
    assert not y[-1].isfinite().any()
    assert y[:-1].isfinite().all()
    assert counters.tolist() == [3, int(active.sum())]


def test_a_nan_indicator_stays_active():
    weights, biases = cases.ffn(13, 29, torch.float32, "cpu")
    weights[1][7, 3] = torch.nan
    counters = counted()
    x = cases.inputs(1, 13, torch.float32, "cpu", 1)
    y = CPU.sparse_ffn(x, weights, biases, torch.full((29,), torch.inf), counters, **HOW)
    assert counters.tolist() == [1, 1]
    assert y.isnan().all()


@pytest.mark.parametrize("by", ["up", "proxy-4"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_same_bits_every_time(tokens, by, threads):
    weights, biases = cases.ffn(100, 700, torch.bfloat16, "cpu")
    x = cases.inputs(tokens, 100, torch.bfloat16, "cpu", 3)
    proxy = cases.proxy_of(weights) if by == "proxy-4" else None
    how = HOW | {"indicator": by, "proxy": proxy}
    thresholds = torch.full((700,), 0.5)
    first = CPU.sparse_ffn(x, weights, biases, thresholds, counted(), **how)
    for _ in range(20):
        assert torch.equal(CPU.sparse_ffn(x, weights, biases, thresholds, counted(), **how), first)


def test_calls_at_once_do_not_share_memory():
    weights, biases = cases.ffn(100, 700, torch.float32, "cpu")
    tokens = [cases.inputs(1, 100, torch.float32, "cpu", seed) for seed in range(4)]

    def outputs(x, times=300):
        return [CPU.sparse_ffn(x, weights, biases, torch.full((700,), 0.5), counted(), **HOW) for _ in range(times)]

    alone = [outputs(x, times=1)[0] for x in tokens]
    with ThreadPoolExecutor(len(tokens)) as pool:
        for expected, found in zip(alone, pool.map(outputs, tokens), strict=True):
            assert all(torch.equal(y, expected) for y in found)


def test_another_default_device_changes_nothing(monkeypatch):
    monkeypatch.setattr(library.library(), "_scratch", library._Scratch())
    weights, biases = cases.ffn(10, 70, torch.float32, "cpu")
    x, thresholds, counters = cases.inputs(1, 10, torch.float32, "cpu", 0), torch.full((70,), 0.5), counted()
    with torch.device("meta"):
        y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, **HOW)
        active = CPU.select(x, weights, biases, thresholds, **HOW)
    assert torch.equal(active, REFERENCE.select(x, weights, biases, thresholds, **HOW))
    expected = oracle.combine(*oracle.projections(x, weights, biases, "silu"), active, weights, biases)
    assert oracle.relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("by", ["up", "gate", "coefficient", "proxy-4"])
def test_equal_indicators_give_the_active_sets_of_the_reference(by):
    # Whole numbers: no sum is rounded, so indicators are equal and may lie on their thresholds.
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randint(-2, 3, shape, generator=generator).float() for shape in ((60, 24), (60, 24), (24, 60))]
    weights[2] = weights[2].t().contiguous().t()
    x = torch.randint(-3, 4, (5, 24), generator=generator).float()
    x[:, 0] = 127  # so that a proxy's steps are whole numbers too
    proxy = cases.proxy_of(weights) if by == "proxy-4" else None
    thresholds = torch.randint(0, 40, (60,), generator=generator).float()
    how = HOW | {"indicator": by, "activation": "relu", "proxy": proxy}
    active = CPU.select(x, weights, NONE, thresholds, **how)
    assert torch.equal(active, REFERENCE.select(x, weights, NONE, thresholds, **how))
    assert 0 < active.sum() < active.numel()


def test_a_token_does_not_see_its_neighbours():
    weights, biases = cases.ffn(24, 60, torch.float32, "cpu")
    x = cases.inputs(8, 24, torch.float32, "cpu", 2)
    thresholds = torch.full((60,), 0.6)
    together = CPU.select(x, weights, biases, thresholds, **HOW)
    alone = [CPU.select(row[None], weights, biases, thresholds, **HOW)[0] for row in x]
    assert torch.equal(together, torch.stack(alone))


def test_strided_and_misaligned_inputs_and_leading_dimensions():
    weights, biases = cases.ffn(16, 24, torch.bfloat16, "cpu")
    wide = torch.cat([torch.zeros(24, 1).bfloat16(), *weights[:2]], dim=1)  # rows longer than d, from an odd address on
    odd = torch.zeros(1 + 24 * 16).bfloat16()[1:].view(24, 16).copy_(weights[2].t()).t()
    x = cases.inputs(4, 32, torch.bfloat16, "cpu", 3)[:, ::2].reshape(2, 2, 16)
    arguments = (biases, torch.full((48,), 0.1)[::2])
    how = HOW | {"indicator": "gate", "activation": "gelu"}
    y = CPU.sparse_ffn(x, [wide[:, 1:17], wide[:, 17:], odd], *arguments, counted(), **how)
    expected = REFERENCE.sparse_ffn(x, weights, *arguments, counted(), **how)
    assert y.shape == x.shape
    assert oracle.relative_error(y, expected.double()) <= 1e-2


F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of each weight, of x, and of biases.
MIXED = [
    *(([weight] * 3, x, bias) for weight in DTYPES for x in DTYPES for bias in dict.fromkeys([weight, x])),
    ([F32, BF16, F16], BF16, F32),
    ([BF16, F32, BF16], BF16, BF16),
    ([BF16, BF16, F32], BF16, F16),
    ([F16, F16, BF16], F32, BF16),
]


@crossed(tokens=[1, 3, 8], by=["up", "gate", "coefficient", "proxy-4"], mixed=MIXED)
def test_dtypes_of_weights_biases_and_tokens_are_independent(tokens, by, mixed):
    dtypes, dtype, bias_dtype = mixed
    weights, biases = cases.ffn(197, 91, F32, "cpu", bias=True, seed=tokens)
    weights = [weight.to(own) for weight, own in zip(weights, dtypes, strict=True)]
    biases = [bias.to(bias_dtype) for bias in biases]
    x = cases.inputs(tokens, 197, dtype, "cpu", 4)
    proxy = cases.proxy_of(weights) if by == "proxy-4" else None
    factors = oracle.projections(x, weights, biases, "silu")
    a, u = factors if proxy is None else oracle.proxy_factors(x, proxy, biases, "silu")
    value = {"up": u, "gate": a}.get(by, a * u)
    thresholds, counters = cases.clear_thresholds(value, 0.6), counted()
    how = HOW | {"indicator": by, "proxy": proxy}
    with cases.poisoned():
        y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, **how)
        active = CPU.select(x, weights, biases, thresholds, **how)
        given = CPU.given_ffn(x, weights, biases, active, activation="silu")
    # Products are in float32: only what is rounded to a narrow x may cross a threshold.
    wrong = int((active != (value.abs() > thresholds.double())).sum())
    assert wrong <= (0 if dtype == F32 or proxy else 0.02 * tokens * 91 + 1)
    assert counters.tolist() == [tokens, int(active.sum())]
    expected = oracle.combine(*factors, active, weights, biases)
    for found in (y, given):
        assert found.dtype == dtype
        assert oracle.relative_error(found, expected) <= cases.TOLERANCE[dtype]
    assert dtype != F32 or torch.equal(active, REFERENCE.select(x, weights, biases, thresholds, **how))


def phased(tokens: int) -> torch.Tensor:
    """Return phases of so many tokens, all of them from three tokens on."""
    return torch.tensor([PROMPT, PADDING, GENERATED, PADDING, GENERATED, PROMPT, GENERATED, PADDING][:tokens]).byte()


@crossed(tokens=range(1, 9), bias=[False, True], dtype=cases.TOLERANCE, by=["up", "gate", "coefficient", "proxy-4"])
def test_phases(tokens, bias, dtype, by, threads):
    weights, biases = cases.ffn(37, 91, dtype, "cpu", bias=bias, seed=tokens)
    x, phases = cases.inputs(tokens, 37, dtype, "cpu", 1), phased(tokens)
    x[phases == PADDING] = 0
    proxy = cases.proxy_of(weights) if by == "proxy-4" else None
    factors = oracle.projections(x, weights, biases, "silu")
    a, u = factors if proxy is None else oracle.proxy_factors(x, proxy, biases, "silu")
    thresholds = cases.clear_thresholds({"up": u, "gate": a}.get(by, a * u), 0.6)
    x[phases == PADDING] = torch.nan  # nobody sees it
    how = HOW | {"indicator": by, "proxy": proxy}
    counters = torch.tensor([3, 5])
    with cases.poisoned():
        active = CPU.select(x, weights, biases, thresholds, phases=phases, **how)
        y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, phases=phases, **how)
        decided = CPU.select(x, weights, biases, thresholds, **how)
    generated = phases == GENERATED
    assert active[phases == PROMPT].all()
    assert not active[phases == PADDING].any()
    assert torch.equal(active[generated], decided[generated])
    assert counters.tolist() == [3 + int(generated.sum()), 5 + int(active[generated].sum())]
    nothing = torch.zeros(37, dtype=dtype) if biases[2] is None else biases[2]
    assert torch.equal(y[phases == PADDING], nothing.expand(int((phases == PADDING).sum()), -1))
    assert oracle.relative_error(y, oracle.combine(*factors, active, weights, biases)) <= cases.TOLERANCE[dtype]
    if dtype == torch.float32:
        expected, seen = counted(), CPU.select(x, weights, biases, thresholds, phases=phases, **how)
        z = REFERENCE.sparse_ffn(x, weights, biases, thresholds, expected, phases=phases, **how)
        assert torch.equal(seen, REFERENCE.select(x, weights, biases, thresholds, phases=phases, **how))
        assert (expected + torch.tensor([3, 5])).tolist() == counters.tolist()
        assert oracle.relative_error(y, z.double()) <= 1e-5


@pytest.mark.parametrize("phase", [GENERATED, PROMPT, PADDING])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("by", ["up", "gate", "coefficient", "proxy-4"])
def test_phases_of_a_token_that_is_not_finite(by, bad, phase):
    weights, biases = cases.ffn(13, 29, torch.float32, "cpu", bias=True)
    x, phases = cases.inputs(3, 13, torch.float32, "cpu", 1), torch.tensor([GENERATED, phase, GENERATED]).byte()
    how = HOW | {"indicator": by, "proxy": cases.proxy_of(weights) if by == "proxy-4" else None}
    thresholds, counters = torch.full((29,), 0.3), counted()
    others = CPU.sparse_ffn(x, weights, biases, thresholds, counted(), phases=phases, **how)[::2]
    x[1, 5] = bad
    y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, phases=phases, **how)
    active = CPU.select(x, weights, biases, thresholds, phases=phases, **how)
    assert active[1].sum() == (0 if phase == PADDING else 29)
    assert torch.equal(y[::2], others)
    assert torch.equal(y[1], biases[2]) if phase == PADDING else not y[1].isfinite().any()
    assert counters.tolist() == [3 - (phase != GENERATED), int(active[phases == GENERATED].sum())]


@pytest.mark.parametrize("tokens", [1, 4])
def test_phases_are_read_anew_where_a_call_is_done_again(tokens, threads):
    weights, biases = cases.ffn(37, 91, torch.float32, "cpu", bias=True)
    x, thresholds = cases.inputs(tokens, 37, torch.float32, "cpu", 1), torch.full((91,), 0.4)
    phases, counters = torch.full((tokens,), GENERATED, dtype=torch.uint8), counted()
    with library.library().watched() as row:
        y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, phases=phases, **HOW)
    again = library.library().again(row)
    for change in (PADDING, PROMPT, GENERATED):
        phases[tokens // 2] = change
        expected, more = counted(), counters.clone()
        alone = CPU.sparse_ffn(x, weights, biases, thresholds, expected, phases=phases, **HOW)
        y.fill_(torch.nan)
        again()
        assert torch.equal(y, alone)
        assert torch.equal(counters, more + expected)


LEFT = {
    "nine tokens": ({"x": torch.randn(9, 16)}, {}),
    "no tokens": ({"x": torch.randn(0, 16)}, {}),
    "topk": ({}, {"decision": "topk", "drop": 10}),
    "activation": ({}, {"activation": "mish"}),
    "layout": ({"plain": True}, {}),
    "float64": ({"dtype": torch.float64}, {}),
    "x in float64": ({"x": torch.randn(1, 16).double()}, {}),
}


@pytest.mark.parametrize(("change", "how"), LEFT.values(), ids=LEFT)
def test_what_no_kernel_takes_is_the_reference_to_the_bit(change, how):
    weights, biases = cases.ffn(16, 24, change.get("dtype", torch.float32), "cpu")
    if "plain" in change:
        weights[2] = weights[2].contiguous()
    x = change.get("x", torch.randn(1, 16, dtype=weights[0].dtype))
    counters = [counted(), counted()]
    y = CPU.sparse_ffn(x, weights, biases, torch.full((24,), 0.3), counters[0], **(HOW | how))
    assert torch.equal(y, REFERENCE.sparse_ffn(x, weights, biases, torch.full((24,), 0.3), counters[1], **(HOW | how)))
    assert torch.equal(*counters)


def test_what_was_right_once_is_checked_again_where_it_differs(monkeypatch):
    weights, biases = cases.ffn(16, 24, torch.float32, "cpu", bias=True)
    x, thresholds = cases.inputs(2, 16, torch.float32, "cpu", 0), torch.full((24,), 0.3)
    y = DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counted(), **HOW)
    assert torch.equal(DISPATCHED.sparse_ffn(x.view(2, 1, 16), weights, biases, thresholds, counted(), **HOW)[:, 0], y)
    assert torch.equal(DISPATCHED.sparse_ffn(x.t().clone().t(), weights, biases, thresholds, counted(), **HOW), y)
    for wrong, message in (
        ((x[:, 1:], weights, biases, thresholds, counted()), "to fit W_gate"),
        ((x, [weights[1], weights[2], weights[0]], biases, thresholds, counted()), "W_up is"),
        ((x, weights, [biases[2], *biases[:2]], thresholds, counted()), "bias of gate has the wrong shape"),
        ((x, weights, biases, thresholds.double(), counted()), "are torch.float64"),
        ((x, weights, biases, thresholds, counted().int()), "counters is torch.int32"),
        ((x, weights, biases, thresholds, torch.zeros(4, dtype=torch.int64)[::2]), "expected contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            DISPATCHED.sparse_ffn(*wrong, **HOW)
    _, options = arguments(x, weights, biases, **HOW)
    with pytest.raises(ValueError, match="weights has 4 tensors, which are not those of plain, plain, plain"):
        torch.ops.countdown.sparse(x, [*weights, biases[0]], biases[1:], thresholds, counted(), None, **options)
    with pytest.raises(ValueError, match=r"phases is torch\.int64"):
        DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counted(), phases=torch.zeros(2).long(), **HOW)
    with pytest.raises(ValueError, match="drop is 25"):
        DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counted(), **HOW | {"drop": 25})
    monkeypatch.setenv("COUNTDOWN_BACKEND", "reference")
    z = DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counted(), **HOW)
    assert torch.equal(z, REFERENCE.sparse_ffn(x, weights, biases, thresholds, counted(), **HOW))


def test_weights_in_other_memory_are_read_there():
    weights, biases = cases.ffn(16, 24, torch.float32, "cpu", bias=True)
    x, thresholds = cases.inputs(1, 16, torch.float32, "cpu", 0), torch.full((24,), 0.3)
    for seed in range(3):
        others, other_biases = cases.ffn(16, 24, torch.float32, "cpu", bias=True, seed=seed)
        for tensor, other in zip([*weights, *biases], [*others, *other_biases], strict=True):
            tensor.data = other
        y = DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counted(), **HOW)
        expected = REFERENCE.sparse_ffn(x, others, other_biases, thresholds, counted(), **HOW)
        assert oracle.relative_error(y, expected.double()) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 4])
def test_copies_in_rows_are_put_into_tiles(tokens):
    weights, biases = cases.ffn(40, 29, torch.float32, "cpu", bias=True)
    x, thresholds = cases.inputs(tokens, 40, torch.float32, "cpu", 1), torch.full((29,), 0.2)
    rows = cases.proxy_of(weights)
    results = []
    for proxy in (rows, rows, [part.in_tiles() for part in rows], [part.in_tiles() for part in rows]):
        how, counters = HOW | {"indicator": "proxy-4", "proxy": proxy}, counted()
        y = DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counters, **how)
        results.append((y, counters, DISPATCHED.select(x, weights, biases, thresholds, **how)))
    assert 0 < results[0][1][1] < tokens * 29
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


def test_copies_in_other_bits_are_left_to_the_reference():
    weights, biases = cases.ffn(32, 20, torch.float32, "cpu")
    x, thresholds, counters = cases.inputs(1, 32, torch.float32, "cpu", 1), torch.full((20,), 0.2), counted()
    how = HOW | {"indicator": "proxy-4", "proxy": cases.proxy_of(weights, bits=3)}
    y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, **how)
    assert torch.equal(y, REFERENCE.sparse_ffn(x, weights, biases, thresholds, counters, **how))


def test_an_explicit_request_is_loud_and_reference_is_obeyed(monkeypatch):
    weights, biases = cases.ffn(16, 24, torch.float32, "cpu")
    x, arguments = torch.randn(1, 16), (torch.full((24,), 0.3), counted())
    monkeypatch.setenv("COUNTDOWN_BACKEND", "cpu")
    with pytest.raises(ConfigError, match="'cpu', which cannot compute this call: W_down is not laid out by neuron"):
        CPU.sparse_ffn(x, [*weights[:2], weights[2].contiguous()], biases, *arguments, **HOW)
    monkeypatch.setenv("COUNTDOWN_BACKEND", "reference")
    y = CPU.sparse_ffn(x, weights, biases, *arguments, **HOW)
    assert torch.equal(y, REFERENCE.sparse_ffn(x, weights, biases, *arguments, **HOW))
    monkeypatch.setenv("COUNTDOWN_BACKEND", "triton")
    chosen = backends.choose(Gated([Plain([weight]) for weight in weights], biases, "silu"), UP, (), "threshold")
    assert chosen.reason == "it runs on GPUs, and the weights are on cpu"


def test_compiled_code_runs_the_same_kernel():
    weights, biases = cases.ffn(24, 60, torch.float32, "cpu")
    x, thresholds = cases.inputs(1, 24, torch.float32, "cpu", 2), torch.full((60,), 0.5)

    def twice(x, counters):
        return 2 * DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counters, **HOW)

    eager, compiled = counted(), counted()
    expected = twice(x, eager)
    y = torch.compile(twice, fullgraph=True, backend="aot_eager")(x, compiled)
    assert torch.equal(y, expected)
    assert torch.equal(compiled, eager)
    assert torch.equal(expected, 2 * CPU.sparse_ffn(x, weights, biases, thresholds, counted(), **HOW))


@pytest.mark.parametrize("apart", [True, False], ids=["on its own threads", "on torch's"])
@pytest.mark.parametrize("order", [[1, 2, 1, 3, 2, 2, 1], [3, 1, 1, 2], [1, 1]], ids=str)
def test_calls_in_a_row_on_any_threads_are_those_calls_alone(order, apart):
    d, h, before = 576, 301, torch.get_num_threads()
    weights, biases = cases.ffn(d, h, torch.float32, "cpu", bias=True, seed=3, form="split")
    square = cases.inputs(d, d, torch.float32, "cpu", 5) / d
    keys, values = (cases.inputs(9 * 300, 64, torch.float32, "cpu", s).view(1, 9, 300, 64) for s in (6, 7))
    x, thresholds = cases.inputs(1, d, torch.float32, "cpu", 0), torch.full((h,), 0.1)
    outputs = []
    try:
        with library.library().watched() as row:
            for threads in order:  # each reads what the one before it wrote
                torch.set_num_threads(threads)
                y = CPU.sparse_ffn(x, weights, biases, thresholds, counted(), **HOW)
                z = dense_ops.project(y, [square], [None])
                a = dense_ops.attend_one(z.view(1, 9, 1, 64), keys, values, None, 0.3)
                x = (a * 2).view(1, d)
                row.extend(small_calls("aten::mul", (a, 2), {}, x.view_as(a)))
                outputs += [y, z, a, x]
    finally:
        torch.set_num_threads(before)
    assert {ran.parts for ran in row} == set(order)
    expected = [y.clone() for y in outputs]
    again = library.library().again(row, apart=apart)
    for _ in range(20):
        for y in outputs:
            y.fill_(torch.nan)
        again()
        for y, alone in zip(outputs, expected, strict=True):
            assert torch.equal(y, alone)
            assert y.isfinite().all()


@pytest.fixture
def row_of_threads():
    """Return a function that does a call of three parts, into `y`: that, its value, and what does it again."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)

    def one(seed: int):
        x, weight = cases.inputs(1, 640, torch.float32, "cpu", seed), cases.inputs(600, 640, torch.float32, "cpu", 1)
        with library.library().watched() as row:
            y = dense_ops.project(x, [weight], [None])
        assert row[0].parts == 3
        return y, y.clone(), library.library().again(row)

    yield one
    torch.set_num_threads(before)


def many_times(y, expected, again) -> bool:
    for _ in range(200):
        y.fill_(torch.nan)
        again()
        if not torch.equal(y, expected):
            return False
    return True


def test_rows_of_calls_in_several_threads_at_once(row_of_threads):
    rows = [row_of_threads(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda row: many_times(*row), rows))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(row_of_threads):
    row = row_of_threads(0)
    assert many_times(*row)
    child = os.fork()
    if not child:
        # Never returns into pytest, whatever happens.
        signal.alarm(60)
        try:
            os._exit(0 if many_times(*row) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert many_times(*row)
