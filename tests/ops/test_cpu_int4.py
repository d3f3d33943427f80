"""The CPU kernels on weights in 4 bits: every variant that this machine runs."""

from __future__ import annotations

import pytest
import torch

import kernel_cases as cases
import oracle
from calls import CPU, REFERENCE
from countdown.ops import backends
from countdown.ops.cpu import library
from countdown.phase import GENERATED, PADDING, PROMPT
from countdown.selectors import UP
from countdown.sums.gated import Gated
from countdown.weights.int4 import rounded
from crossing import crossed

if library.missing():
    pytest.skip(f"no CPU kernels: {library.missing()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("variant")
PHASES = [PROMPT, PADDING, GENERATED, GENERATED, PADDING, GENERATED, PROMPT, GENERATED]


def ffn(d, h, *, bias=False, seed=0):
    """Weights in 4 bits, the same as floats, and biases."""
    plain, biases = cases.ffn(d, h, torch.float32, "cpu", bias=bias, seed=seed)
    weights = [rounded(plain[0]), rounded(plain[1]), rounded(plain[2], by_column=True)]
    return weights, [weight.values() for weight in weights], biases


@crossed(
    by=["up", "gate", "coefficient", "proxy-4"],
    shape=[(64, 1), (64, 33), (128, 300), (1088, 130)],
    dtype=cases.TOLERANCE,
    tokens=[1, 2, 3, 5, 8],
    bias=[False, True],
    phased=[False, True],
)
def test_against_float64(by, shape, dtype, tokens, bias, phased, threads):
    weights, values, biases = ffn(*shape, bias=bias, seed=tokens)
    x = cases.inputs(tokens, shape[0], dtype, "cpu", 1)
    proxy = cases.proxy_of(values) if by == "proxy-4" else None
    factors = oracle.projections(x, values, biases, "silu")
    a, u = factors if proxy is None else oracle.proxy_factors(x, proxy, biases, "silu")
    thresholds = cases.clear_thresholds({"up": u, "gate": a}.get(by, a * u), 0.6)
    phases = torch.tensor(PHASES[:tokens]).byte() if phased else None
    how = {"indicator": by, "activation": "silu", "proxy": proxy, "phases": phases}
    counters = torch.zeros(2, dtype=torch.int64)
    with cases.poisoned():
        active = CPU.select(x, weights, biases, thresholds, **how)
        y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, **how)
    counted = torch.ones(tokens).bool() if phases is None else phases == GENERATED
    assert counters.tolist() == [int(counted.sum()), int(active[counted].sum())]
    assert oracle.relative_error(y, oracle.combine(*factors, active, values, biases)) <= cases.TOLERANCE[dtype]
    if dtype == torch.float32:
        assert torch.equal(active, REFERENCE.select(x, weights, biases, thresholds, **how))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("by", ["up", "gate"])
def test_a_second_look(by, tokens, threads):
    weights, values, biases = ffn(192, 500)
    x = cases.inputs(tokens, 192, torch.float32, "cpu", 1)
    a, u = oracle.projections(x, values, biases, "silu")
    thresholds = torch.stack([
        cases.clear_thresholds({"up": u, "gate": a}[by], 0.4), cases.clear_thresholds(a * u, 0.7)
    ])  # fmt: skip
    how = {"indicator": by, "activation": "silu"}
    found, expected = (torch.zeros(3, dtype=torch.int64) for _ in range(2))
    y = CPU.sparse_ffn(x, weights, biases, thresholds, found, **how)
    z = REFERENCE.sparse_ffn(x, weights, biases, thresholds, expected, **how)
    assert oracle.relative_error(y, z.double()) <= 1e-5
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("shape", [(64, 128), (192, 61), (1088, 320)], ids=str)
def test_a_linear_stored_by_input_channel(shape, tokens, threads):
    out, d = shape
    weight = rounded(torch.randn(out, d, generator=torch.Generator().manual_seed(0)), by_column=True)
    x, bias = cases.inputs(tokens, d, torch.float32, "cpu", 1), torch.randn(out)
    thresholds, counters = torch.full((d,), 0.5), torch.zeros(2, dtype=torch.int64)
    with cases.poisoned():
        y = CPU.sparse_linear(x, weight, bias, thresholds, counters, indicator="input")
    kept = x.abs() > 0.5
    expected = (x.double() * kept) @ weight.values().double().t() + bias
    assert oracle.relative_error(y, expected) <= 1e-5
    assert counters.tolist() == [tokens, int(kept.sum())]


def test_the_same_bits_every_time_and_whoever_the_neighbours_are(threads):
    weights, _, biases = ffn(640, 2048)
    x, thresholds = cases.inputs(1, 640, torch.bfloat16, "cpu", 1), torch.full((2048,), 0.3)
    how = {"indicator": "up", "activation": "silu"}
    first, again = (
        CPU.sparse_ffn(x, weights, biases, thresholds, torch.zeros(2, dtype=torch.int64), **how) for _ in range(2)
    )
    assert torch.equal(first, again)
    both = CPU.select(torch.cat([x, -2 * x]), weights, biases, thresholds, **how)
    assert torch.equal(both[:1], CPU.select(x, weights, biases, thresholds, **how))


def test_a_token_that_is_not_finite_is_dense_and_alone():
    weights, _, biases = ffn(64, 100)
    x, counters = cases.inputs(2, 64, torch.float32, "cpu", 1), torch.zeros(2, dtype=torch.int64)
    x[1, 5] = torch.nan
    how = {"indicator": "up", "activation": "silu"}
    y = CPU.sparse_ffn(x, weights, biases, torch.full((100,), torch.inf), counters, **how)
    assert not y[0].any()
    assert y[1].isnan().all()
    assert counters.tolist() == [2, 100]


def test_gpus_leave_them_to_the_reference():
    weights, _, biases = ffn(64, 100)
    refusal = backends.BACKENDS["cuda"].refuses(Gated(weights, biases, "silu"), UP, [], "threshold")
    assert refusal == "it has no kernel for weights in format 'int4'"
    assert backends.BACKENDS["cpu"].refuses(Gated(weights, biases, "silu"), UP, [], "threshold") is None
