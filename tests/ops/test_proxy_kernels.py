"""The kernels that decide by a proxy: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases
import oracle
from calls import REFERENCE, TRITON
from countdown.errors import ConfigError
from countdown.ops.triton.backend import Triton
from countdown.weights import Plain
from crossing import crossed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOW = {"decision": "threshold", "drop": 0, "indicator": "proxy-4", "activation": "silu"}


@crossed(activation=Triton.activations, share=[0.0, 0.5, 0.95], tokens=[1, 2, 3])
def test_against_float64(activation, share, tokens):
    cases.check_proxy(tokens, 37, 91, torch.float32, DEVICE, activation=activation, share=share)


@crossed(
    tokens=[1, 2],
    stored=[(1, 1, "split"), (16, 8, "interleaved"), (64, 256, "fused"), (129, 67, "split"), (100, 33, "interleaved")],
    dtype=cases.TOLERANCE,
)
def test_shapes_dtypes_and_forms(tokens, stored, dtype):
    d, h, form = stored
    cases.check_proxy(
        tokens, d, h, dtype, DEVICE, activation="silu", share=0.6, bias=form != "fused", form=form, seed=d + h
    )


@crossed(activation=["silu", "relu"], bad=[torch.nan, torch.inf], tokens=[1, 2, 3])
def test_a_token_that_is_not_finite_is_dense_and_alone(activation, bad, tokens):
    weights, biases = cases.ffn(40, 29, torch.float32, DEVICE, bias=True)
    proxy, x = cases.proxy_of(weights), cases.inputs(tokens, 40, torch.float32, DEVICE, 1)
    thresholds = torch.full((29,), 0.2, device=DEVICE)
    how = HOW | {"activation": activation, "proxy": proxy}
    clean = TRITON.select(x, weights, biases, thresholds, **how)
    x[-1, 5] = bad
    counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    y = TRITON.sparse_ffn(x, weights, biases, thresholds, counters, **how)
    active = TRITON.select(x, weights, biases, thresholds, **how)
    assert active[-1].all()
    assert torch.equal(active[:-1], clean[:-1])
    assert not y[-1].isfinite().any()
    assert y[:-1].isfinite().all()
    assert counters.tolist() == [tokens, int(active.sum())]


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_a_token_of_zeros_and_none_active(tokens):
    weights, biases = cases.ffn(21, 50, torch.float32, DEVICE, bias=True)
    proxy, counters = cases.proxy_of(weights), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    thresholds = torch.full((50,), torch.inf, device=DEVICE)
    with cases.poisoned():
        y = TRITON.sparse_ffn(
            torch.zeros(tokens, 21, device=DEVICE), weights, biases, thresholds, counters, **HOW, proxy=proxy
        )
    assert torch.equal(y, biases[2].expand(tokens, -1))
    assert counters.tolist() == [tokens, 0]


def test_inputs_are_rounded_as_in_the_reference():
    # Halves between two steps, and both ends of the range.
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.49]], device=DEVICE)
    weights, biases = cases.ffn(8, 400, torch.float32, DEVICE)
    proxy = cases.proxy_of(weights)
    a, u = oracle.proxy_factors(x.cpu(), proxy, [None] * 3, "silu")
    for value in (a * u).abs()[0].sort().values[-40::8].tolist():
        thresholds = torch.full((400,), value * (1 - 1e-4), device=DEVICE)
        active = TRITON.select(x, weights, biases, thresholds, **HOW, proxy=proxy)
        assert torch.equal(active.cpu(), (a * u).abs() > value * (1 - 1e-4))


def test_proxies_of_3_bits_are_left_to_the_reference(monkeypatch):
    weights, biases = cases.ffn(32, 20, torch.float32, DEVICE)
    proxy, x = cases.proxy_of(weights, bits=3), cases.inputs(1, 32, torch.float32, DEVICE, 1)
    thresholds, counters = torch.full((20,), 0.2, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    how = HOW | {"indicator": "proxy-3", "proxy": proxy}
    expected = REFERENCE.sparse_ffn(x, weights, biases, thresholds, counters, **how)
    assert torch.equal(TRITON.sparse_ffn(x, weights, biases, thresholds, counters, **how), expected)
    monkeypatch.setenv("COUNTDOWN_BACKEND", "triton")
    with pytest.raises(ConfigError, match="no kernel for selector 'proxy-3', only: up, gate, proxy-4"):
        TRITON.sparse_ffn(x, weights, biases, thresholds, counters, **how)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_tiles_are_put_into_rows(tokens):
    weights, biases = cases.ffn(40, 29, torch.float32, DEVICE, bias=True)
    proxy, x = cases.proxy_of(weights), cases.inputs(tokens, 40, torch.float32, DEVICE, 1)
    thresholds = torch.full((29,), 0.2, device=DEVICE)
    results = []
    for form in (proxy, [weight.in_tiles() for weight in proxy]):
        counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        y = TRITON.sparse_ffn(x, weights, biases, thresholds, counters, **HOW, proxy=form)
        results.append((y, counters, TRITON.select(x, weights, biases, thresholds, **HOW, proxy=form)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert results[0][1][1] > 0


def test_a_copy_that_is_not_in_4_bits_is_left_to_the_reference():
    weights, biases = cases.ffn(40, 29, torch.float32, DEVICE, bias=True)
    x = cases.inputs(1, 40, torch.float32, DEVICE, 1)
    arguments = (x, weights, biases, torch.full((29,), 0.2, device=DEVICE))
    how = HOW | {"proxy": [Plain([weight]) for weight in weights[:2]]}
    assert torch.equal(TRITON.select(*arguments, **how), REFERENCE.select(*arguments, **how))
