"""The Triton kernels on small shapes: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases
import oracle
from calls import REFERENCE, TRITON
from countdown.errors import ConfigError
from countdown.ops.triton import ffn, launch, linear
from countdown.ops.triton.backend import Triton
from countdown.phase import GENERATED, PADDING, PROMPT
from crossing import crossed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@crossed(activation=Triton.activations, indicator=["up", "gate"], share=[0.0, 0.5, 0.95], tokens=[1, 2, 3, 8])
def test_against_float64(activation, indicator, share, tokens):
    cases.check_sparse(tokens, 37, 91, torch.float32, DEVICE, indicator=indicator, activation=activation, share=share)


SHARES = [(0.0, 0.0), (0.0, 0.5), (0.4, 0.6), (0.9, 0.95)]


@crossed(activation=Triton.activations, indicator=["up", "gate"], shares=SHARES, tokens=[1, 2, 3, 8])
def test_a_second_look_against_float64(activation, indicator, shares, tokens):
    how = {"indicator": indicator, "activation": activation, "shares": shares, "bias": tokens != 2}
    cases.check_second_look(tokens, 37, 91, torch.float32, DEVICE, **how)


@crossed(shape=[(1, 1), (16, 8), (64, 256), (129, 67)], dtype=cases.TOLERANCE, tokens=[1, 2, 5])
def test_a_second_look_of_shapes_and_dtypes(shape, dtype, tokens):
    how = {"indicator": "up", "activation": "silu", "shares": (0.5, 0.6), "form": "fused", "seed": sum(shape)}
    cases.check_second_look(tokens, *shape, dtype, DEVICE, **how)


@crossed(tokens=[1, 2, 4], indicator=["up", "gate"], first=[GENERATED, PROMPT, PADDING])
def test_a_second_look_minds_phases(tokens, indicator, first):
    phases = torch.tensor([first, PROMPT, GENERATED, PADDING][:tokens], dtype=torch.uint8)
    how = {"indicator": indicator, "activation": "silu", "shares": (0.5, 0.6), "phases": phases}
    cases.check_second_look(tokens, 37, 91, torch.float32, DEVICE, **how)


@crossed(
    form=["split", "fused", "interleaved"],
    tokens=[1, 2],
    shape=[(1, 1), (16, 8), (64, 256), (129, 67), (40, 33)],
    dtype=cases.TOLERANCE,
)
def test_shapes_dtypes_and_forms(form, tokens, shape, dtype):
    cases.check_sparse(
        tokens, *shape, dtype, DEVICE, indicator="up", activation="silu", share=0.6,
        bias=form != "fused", form=form, seed=sum(shape),
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_none_and_one_active(tokens):
    weights, biases = cases.ffn(21, 50, torch.float32, DEVICE, bias=True)
    x = cases.inputs(tokens, 21, torch.float32, DEVICE, 0)
    how = {"decision": "threshold", "drop": 49, "indicator": "up", "activation": "silu"}
    counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    thresholds = torch.full((50,), torch.inf, device=DEVICE)
    with cases.poisoned():
        none = TRITON.sparse_ffn(x, weights, biases, thresholds, counters, **how)
    assert torch.equal(none, biases[2].expand(tokens, -1))
    assert counters.tolist() == [tokens, 0]
    thresholds[17] = -1
    with cases.poisoned():
        one = TRITON.sparse_ffn(x, weights, biases, thresholds, counters, **how)
    assert counters.tolist() == [2 * tokens, tokens]
    active = torch.zeros(tokens, 50, dtype=torch.bool)
    active[:, 17] = True
    a, u = oracle.projections(x.cpu(), cases.on_cpu(weights), cases.on_cpu(biases), "silu")
    expected = oracle.combine(a, u, active, cases.on_cpu(weights), cases.on_cpu(biases))
    assert oracle.relative_error(one.cpu(), expected) <= 1e-5


@crossed(tokens=[1, 2, 3], bad=[torch.nan, torch.inf], activation=Triton.activations, indicator=["up", "gate"])
def test_a_token_that_is_not_finite_is_dense_and_alone(tokens, bad, activation, indicator):
    weights, biases = cases.ffn(13, 29, torch.float32, DEVICE)
    x = cases.inputs(tokens, 13, torch.float32, DEVICE, 1)
    how = {"decision": "threshold", "drop": 0, "indicator": indicator, "activation": activation}
    thresholds = torch.full((29,), 0.4, device=DEVICE)
    clean = TRITON.select(x, weights, biases, thresholds, **how)
    x[-1, 5] = bad
    counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    y = TRITON.sparse_ffn(x, weights, biases, thresholds, counters, **how)
    active = TRITON.select(x, weights, biases, thresholds, **how)
    assert active[-1].all()
    assert torch.equal(active[:-1], clean[:-1])
    assert not y[-1].isfinite().any()
    counted = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    twice = TRITON.sparse_ffn(x, weights, biases, thresholds.expand(2, -1), counted, **how)
    assert not twice[-1].isfinite().any()
    assert counted.tolist()[:2] == counters.tolist()
    assert counted[2] >= 29
    # Whatever the thresholds, also where a column is 0.
    thresholds[:] = torch.inf
    TRITON.sparse_ffn(x, weights, biases, thresholds.expand(2, -1), counted.zero_(), **how)
    assert counted.tolist() == [tokens, 29, 29]
    assert y[:-1].isfinite().all()
    assert counters.tolist() == [tokens, int(active.sum())]


def test_a_nan_indicator_stays_active():
    weights, biases = cases.ffn(13, 29, torch.float32, DEVICE)
    weights[1][7, 3] = torch.nan
    how = {"decision": "threshold", "drop": 0, "indicator": "up", "activation": "silu"}
    counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    x = cases.inputs(1, 13, torch.float32, DEVICE, 1)
    y = TRITON.sparse_ffn(x, weights, biases, torch.full((29,), torch.inf, device=DEVICE), counters, **how)
    assert counters.tolist() == [1, 1]
    assert y.isnan().all()


def test_a_token_does_not_see_its_neighbours():
    weights, biases = cases.ffn(24, 60, torch.float32, DEVICE)
    x = cases.inputs(8, 24, torch.float32, DEVICE, 2)
    how = {"decision": "threshold", "drop": 30, "indicator": "up", "activation": "silu"}
    thresholds = torch.full((60,), 0.6, device=DEVICE)
    together = TRITON.select(x, weights, biases, thresholds, **how)
    alone = [TRITON.select(row[None], weights, biases, thresholds, **how)[0] for row in x]
    assert torch.equal(together, torch.stack(alone))


def test_strided_inputs_and_leading_dimensions():
    weights, biases = cases.ffn(16, 24, torch.float32, DEVICE)
    wide = torch.cat(weights[:2], dim=1)  # rows longer than d
    padded = [wide[:, :16], wide[:, 16:], weights[2]]
    x = cases.inputs(4, 32, torch.float32, DEVICE, 3)[:, ::2].reshape(2, 2, 16)
    counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    how = {"decision": "threshold", "drop": 0, "indicator": "gate", "activation": "gelu"}
    arguments = (biases, torch.full((24,), 0.1, device=DEVICE), counters)
    y = TRITON.sparse_ffn(x, padded, *arguments, **how)
    expected = REFERENCE.sparse_ffn(x.contiguous(), weights, *arguments, **how)
    assert y.shape == x.shape
    torch.testing.assert_close(y, expected)


PHASES = [
    [GENERATED], [PROMPT], [PADDING],
    [GENERATED, PADDING], [PADDING, PROMPT], [PROMPT, GENERATED], [GENERATED, GENERATED], [PADDING, PADDING],
    [PADDING, GENERATED, PROMPT], [PADDING] * 3,
    [PROMPT, GENERATED, GENERATED, PADDING, GENERATED, PADDING, PROMPT, GENERATED],
]  # fmt: skip


@crossed(by=Triton.selectors["ffn"], phases=PHASES, bias=[False, True])
def test_phases(by, phases, bias):
    cases.check_phases(phases, 37, 91, torch.float32, DEVICE, by=by, bias=bias)


@crossed(
    by=Triton.selectors["ffn"],
    shape=[(1, 1), (3, 7), (37, 91), (200, 50)],
    dtype=cases.TOLERANCE,
    phases=[None, [GENERATED], [PROMPT, GENERATED], [GENERATED, GENERATED, PADDING, PROMPT, GENERATED]],
)
def test_what_is_predicted_against_float64(by, shape, dtype, phases):
    tokens = 3 if phases is None else len(phases)
    cases.check_affine(tokens, *shape, dtype, DEVICE, by=by, phases=phases, bias=True)


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("by", Triton.selectors["ffn"])
def test_phases_of_any_number_of_tokens_in_16_bits(by, tokens):
    phases = [(tokens + place) % 3 for place in range(tokens)]
    cases.check_phases(phases, 40, 33, torch.float16, DEVICE, by=by, seed=tokens)


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("by", Triton.selectors["ffn"])
def test_generated_tokens_with_their_phases_said_are_those_without(by, tokens):
    weights, biases = cases.ffn(24, 60, torch.float32, DEVICE, bias=True)
    x = cases.inputs(tokens, 24, torch.float32, DEVICE, 2)
    how, thresholds, _ = cases.decided(by, x, weights, biases, 0.5)
    x[-1, 3] = torch.inf  # dense, and counted
    results = []
    for phases in (None, torch.zeros(tokens, dtype=torch.uint8, device=DEVICE)):
        counters = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        y = TRITON.sparse_ffn(x, weights, biases, thresholds, counters, phases=phases, **how)
        results.append((y[:-1], counters, TRITON.select(x, weights, biases, thresholds, phases=phases, **how)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert results[0][2][-1].all()


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MIXED = [(x, [w] * 3) for x in FLOATS for w in FLOATS if x != w]
MIXED += [(x, [torch.bfloat16, torch.float32, torch.float16]) for x in FLOATS]


@crossed(by=Triton.selectors["ffn"], mixed=MIXED, tokens=[1, 2, 3])
def test_tokens_and_weights_of_different_dtypes(by, mixed, tokens):
    cases.check_mixed(tokens, 40, 67, *mixed, DEVICE, by=by, seed=tokens)


def test_the_tables_are_what_the_backend_says_it_takes():
    assert set(ffn.DECIDERS) == set(Triton.selectors["ffn"])
    assert set(ffn.FORMATS) == set(linear.FORMATS) == set(Triton.formats)


LEFT = {
    "nine tokens": ({"x": torch.randn(9, 16)}, {}),
    "topk": ({}, {"decision": "topk", "drop": 10}),
    "coefficient": ({}, {"indicator": "coefficient"}),
    "activation": ({}, {"activation": "mish"}),
    "layout": ({"plain": True}, {}),
}


@pytest.mark.parametrize("change, how", LEFT.values(), ids=LEFT)
def test_what_no_kernel_takes_is_the_reference_to_the_bit(change, how):
    weights, biases = cases.ffn(16, 24, torch.float32, DEVICE)
    if "plain" in change:
        weights[2] = weights[2].contiguous()
    x = change.get("x", torch.randn(1, 16)).to(DEVICE)
    how = {"decision": "threshold", "drop": 0, "indicator": "up", "activation": "silu"} | how
    per_neuron = torch.full((24,), 0.3, device=DEVICE)
    counters = [torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    y = TRITON.sparse_ffn(x, weights, biases, per_neuron, counters[0], **how)
    assert torch.equal(y, REFERENCE.sparse_ffn(x, weights, biases, per_neuron, counters[1], **how))
    assert torch.equal(*counters)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (37, 91), (576, 1536), (640, 2048), (896, 4864), (1536, 8960), (3584, 14336), (4096, 14336),
     (5120, 13824), (5120, 17920), (8192, 28672), (16384, 53248)],
)  # fmt: skip
@pytest.mark.parametrize("multiprocessors", [2, 46, 132])
def test_launches_cover_every_neuron_and_fit(shape, itemsize, multiprocessors):
    d, h = shape
    found = launch.Hardware(multiprocessors, shared=100 * 1024, dependent_launch=False, dot4=False, tf32=False)
    proxy = 8 * launch.packed(d, found)[1]
    deciding = [
        config
        for expected in (0, h // 10, h)
        for tokens, read in ((1, None), (1, proxy), (2, None), (2, 2), (2, proxy))
        # None where a token is too wide for two.
        if (config := launch.row_blocks(d, h, itemsize, tokens, expected, found, read=read)) is not None
    ]
    assert len(deciding) == (15 if d <= launch.PAIR_WIDTH else 6)
    for config in deciding:
        blocks = -(-h // config.constants["ROWS"])
        most = -(-blocks // config.grid[0]) * config.constants["ROWS"]
        assert config.constants["MINE"] >= most
        assert config.constants["D"] >= d
    config = launch.listed(d, h, itemsize, found)
    assert config.grid[0] * config.constants["MINE"] >= h
    config, each = launch.columns(d, h, itemsize, found)
    assert config.grid[0] * config.constants["COLUMNS"] >= d
    assert config.grid[1] * each >= h > (config.grid[1] - 1) * each
    assert each % config.constants["ROWS"] == 0


@pytest.mark.parametrize("shape", [(576, 1536), (3584, 14336), (4096, 14336), (8192, 28672)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
def test_two_programs_of_a_sum_fit_a_multiprocessor_and_no_third(shape, tokens):
    d, h = shape
    found = launch.Hardware(multiprocessors=132, shared=227 * 1024, dependent_launch=True, dot4=True, tf32=True)
    proxy = 8 * launch.packed(d, found)[1]
    for read, looks in ((None, 1), (None, 2), (proxy, 1)):
        config = launch.row_blocks(d, h, 2, tokens, h // 5, found, read=read, looks=looks)
        if config is None:
            assert d > launch.PAIR_WIDTH
            continue
        constants = config.constants
        ahead = (constants["STAGES"] - 1) * constants["ROWS"] * (read or 2 * constants["D"])
        assert 2 * ahead <= found.shared < 3 * ahead
    # Sets are next to nothing to read.
    config = launch.row_blocks(d, h, 2, tokens, h // 5, found, read=tokens)
    assert config is None or config.constants["STAGES"] <= 4


def test_strided_thresholds():
    weights, biases = cases.ffn(16, 24, torch.float32, DEVICE)
    x = cases.inputs(1, 16, torch.float32, DEVICE, 4)
    spread = torch.rand(24, 2, device=DEVICE)
    counters = [torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    how = {"decision": "threshold", "drop": 0, "indicator": "up", "activation": "silu"}
    y = TRITON.sparse_ffn(x, weights, biases, spread[:, 0], counters[0], **how)
    expected = TRITON.sparse_ffn(x, weights, biases, spread[:, 0].contiguous(), counters[1], **how)
    assert torch.equal(y, expected)
    assert torch.equal(*counters)


def test_an_explicit_request_is_loud_and_reference_is_obeyed(monkeypatch):
    weights, biases = cases.ffn(16, 24, torch.float32, DEVICE)
    x, counters = torch.randn(1, 16, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    arguments = (torch.full((24,), 0.3, device=DEVICE), counters)
    how = {"decision": "threshold", "drop": 0, "indicator": "up", "activation": "silu"}
    monkeypatch.setenv("COUNTDOWN_BACKEND", "triton")
    with pytest.raises(ConfigError, match="cannot compute this call: W_down is not laid out by neuron"):
        TRITON.sparse_ffn(x, [*weights[:2], weights[2].contiguous()], biases, *arguments, **how)
    monkeypatch.setenv("COUNTDOWN_BACKEND", "reference")
    y = TRITON.sparse_ffn(x, weights, biases, *arguments, **how)
    assert torch.equal(y, REFERENCE.sparse_ffn(x, weights, biases, *arguments, **how))


# Bytes of shared memory that a program may have: A100, RTX 30 and 40, H100 and H200, RTX 50, and MI300.
LIMITS = {
    "cuda:80": 166912, "cuda:86": 101376, "cuda:89": 101376, "cuda:90": 232448, "cuda:120": 101376,
    "hip:gfx942": 65536,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", LIMITS)
def test_kernels_compile_and_fit_the_shared_memory(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.path.join(os.path.dirname(__file__), os.pardir, "compile_kernels.py")
    run = subprocess.run(
        [sys.executable, path, target, str(LIMITS[target])],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    shared = json.loads(run.stdout)
    assert len(shared) == 154
    assert {name: size for name, size in shared.items() if size > LIMITS[target]} == {}
