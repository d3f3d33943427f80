"""The ops against the float64 oracle, opcheck, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from calls import DISPATCHED, REFERENCE, arguments, sparse_module
from countdown.errors import ConfigError
from countdown.methods import method
from countdown.ops import reference
from countdown.phase import GENERATED, PADDING, PROMPT
from countdown.sites.gated import GatedFFN
from countdown.sites.holders import Rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def call(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], per_neuron: Tensor, **how: object):
    counters = torch.zeros(2, dtype=torch.int64)
    how = {"decision": "threshold", "drop": 0, "indicator": "up", "activation": "silu"} | how
    active = DISPATCHED.select(x, weights, biases, per_neuron, **how)
    y = DISPATCHED.sparse_ffn(x, weights, biases, per_neuron, counters, **how)
    return y, active, counters


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 40),
    h=st.integers(1, 70),
    tokens=st.integers(1, 8),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    activation=st.sampled_from(list(oracle.ACT)),
    indicator=st.sampled_from(oracle.FFN_INDICATORS),
    share=st.floats(0, 1),
    decision=st.sampled_from(["threshold", "topk"]),
    seed=st.integers(0, 1000),
)
def test_sparse_ffn_is_the_masked_dense_ffn(d, h, tokens, dtype, bias, activation, indicator, share, decision, seed):
    weights, biases = oracle.random_ffn(d, h, dtype, bias=bias, seed=seed)
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    drop = int(share * h)
    per_neuron = torch.full((h,), share)
    y, active, counters = call(
        x, weights, biases, per_neuron, decision=decision, drop=drop, indicator=indicator, activation=activation
    )
    a, u = oracle.projections(x, weights, biases, activation)
    expected = oracle.combine(a, u, active, weights, biases)
    # Against the size of the dense output: nearly everything may have been dropped.
    scale = oracle.combine(a, u, torch.ones_like(active), weights, biases).norm().item()
    assert (y.double() - expected).norm().item() <= TOLERANCE[dtype] * max(scale, 1.0)
    assert counters.tolist() == [tokens, int(active.sum())]
    if decision == "topk":
        assert (active.sum(dim=-1) == h - drop).all()


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 40),
    tokens=st.integers(1, 5),
    indicator=st.sampled_from(oracle.FFN_INDICATORS),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_active_sets_are_what_the_rule_says(h, tokens, indicator, share, seed):
    # Small integers: exact in float32, and full of ties.
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(-3, 4, shape, generator=generator).float() for shape in ((h, 6), (h, 6), (6, h))]
    none: list[Tensor | None] = [None, None, None]
    x = torch.randint(-2, 3, (tokens, 6), generator=generator).float()
    importance = torch.randint(0, 4, (h,), generator=generator).float()
    a, u = oracle.projections(x, weights, none, "relu")
    drop = int(share * h)
    _, active, _ = call(
        x, weights, none, importance, decision="topk", drop=drop, indicator=indicator, activation="relu"
    )
    _, above, _ = call(x, weights, none, importance, indicator=indicator, activation="relu")
    for token in range(tokens):
        pairs = zip(a[token].tolist(), u[token].tolist(), strict=True)
        scores = [oracle.INDICATOR[indicator](*pair) for pair in pairs]
        weighted = [score * weight for score, weight in zip(scores, importance.tolist(), strict=True)]
        assert active[token].tolist() == oracle.topk_active(weighted, drop)
        thresholds = importance.tolist()
        assert above[token].tolist() == [not s <= t for s, t in zip(scores, thresholds, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 40),
    out=st.integers(1, 50),
    tokens=st.integers(1, 8),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    share=st.floats(0, 1),
    decision=st.sampled_from(["threshold", "topk"]),
    seed=st.integers(0, 1000),
)
def test_sparse_linear_is_the_linear_of_the_masked_input(d, out, tokens, dtype, bias, share, decision, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, d, generator=generator) / d**0.5).to(dtype)
    offset = torch.randn(out, generator=generator).to(dtype) if bias else None
    # Few values: full of ties, and exact in every dtype.
    x = (torch.randint(-4, 5, (tokens, d), generator=generator) / 2).to(dtype)
    per_channel = torch.randint(0, 4, (d,), generator=generator).float()
    counters, drop = torch.zeros(2, dtype=torch.int64), int(share * d)
    z = DISPATCHED.sparse_linear(
        x, weight, offset, per_channel, counters, decision=decision, drop=drop, indicator="input"
    )
    expected, active = torch.zeros(tokens, out).double(), 0
    for token in range(tokens):
        sizes, given = x[token].double().abs().tolist(), per_channel.tolist()
        if decision == "threshold":
            kept = [not size <= threshold for size, threshold in zip(sizes, given, strict=True)]
        else:
            kept = oracle.topk_active([size * weight for size, weight in zip(sizes, given, strict=True)], drop)
        expected[token] = weight.double() @ (x[token].double() * torch.tensor(kept))
        active += sum(kept)
    if offset is not None:
        expected += offset.double()
    assert oracle.relative_error(z, expected) <= TOLERANCE[dtype] or (z.double() - expected).norm() <= TOLERANCE[dtype]
    assert counters.tolist() == [tokens, active]


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(2, 24),
    h=st.integers(1, 30),
    form=st.sampled_from(["split", "fused", "up first", "interleaved"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
)
def test_the_module_is_the_masked_dense_module_in_every_form(d, h, form, dtype, bias, sparsity, seed):
    weights, biases = oracle.random_ffn(d, h, dtype, bias=bias, seed=seed)
    site = ffn_of(form, weights, biases)
    config = method("m-countdown", decision="topk", sparsity=sparsity)
    module = sparse_module(site, config, torch.ones(h), apply_to="all")
    x = torch.randn(1, 3, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        y = module(x)[0]
    a, u = oracle.projections(x[0], weights, biases, "silu")
    # The op ranks u as rounded to its dtype, and so does this.
    rounded = site.sum.project(x[0])[1].double()
    active = torch.tensor([oracle.topk_active(row, config.drop(h)) for row in rounded.abs().tolist()])
    expected = oracle.combine(a, u, active, weights, biases)
    scale = oracle.combine(a, u, torch.ones_like(active), weights, biases).norm().item()
    assert (y.double() - expected).norm().item() <= TOLERANCE[dtype] * max(scale, 1.0)
    assert module.counters.tolist() == [3, int(active.sum())]


def ffn_of(form, weights, biases):
    """A module with these weights, gate and up apart or fused in one of three ways, as a site."""
    h = weights[0].shape[0]
    parts = {"gate": (weights[0], biases[0]), "up": (weights[1], biases[1]), "down": (weights[2], biases[2])}
    rows = {"gate": Rows("gate"), "up": Rows("up"), "down": Rows("down")}
    if form != "split":
        pair = ["up", "gate"] if form == "up first" else ["gate", "up"]
        both = [
            torch.stack([parts[name][i] for name in pair]) if parts["gate"][i] is not None else None for i in (0, 1)
        ]
        if form == "interleaved":
            both = [None if b is None else b.transpose(0, 1) for b in both]
            rows |= {"gate": Rows("fused", 0, None, 2), "up": Rows("fused", 1, None, 2)}
        else:
            rows |= {pair[0]: Rows("fused", 0, h), pair[1]: Rows("fused", h, 2 * h)}
        fused, bias = (None if b is None else b.reshape(2 * h, *b.shape[2:]) for b in both)
        parts = {"fused": (fused, bias), "down": parts["down"]}
    module = nn.Module()
    for name, (weight, bias) in parts.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
        linear.bias = None if bias is None else nn.Parameter(bias)
        module.add_module(name, linear)
    return GatedFFN("ffn", module.eval(), rows["gate"], rows["up"], rows["down"], "silu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nothing_dropped_gives_the_dense_bits(dtype):
    weights, biases = oracle.random_ffn(37, 91, dtype, bias=True)
    x = torch.randn(2, 5, 37).to(dtype)
    gate, up, down = weights
    linear = torch.nn.functional.linear
    dense = linear(torch.nn.functional.silu(linear(x, gate, biases[0])) * linear(x, up, biases[1]), down, biases[2])
    y, _, _ = call(x, weights, biases, torch.full((91,), -1.0))
    assert torch.equal(y, dense)
    y, _, _ = call(x, weights, biases, torch.ones(91), decision="topk", drop=0)
    assert torch.equal(y, dense)


def test_none_active_leaves_only_the_bias():
    weights, biases = oracle.random_ffn(7, 11, torch.float32, bias=True)
    y, active, counters = call(torch.randn(3, 7), weights, biases, torch.full((11,), torch.inf))
    assert not active.any()
    assert torch.equal(y, biases[2].expand(3, 7))
    assert counters.tolist() == [3, 0]


def test_infinite_threshold_drops_that_neuron_alone():
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    per_neuron = torch.full((11,), -1.0)
    per_neuron[4] = torch.inf
    _, active, _ = call(torch.randn(3, 7), weights, biases, per_neuron)
    assert active.sum(dim=0).tolist() == [3, 3, 3, 3, 0, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("decision", ["threshold", "topk"])
@pytest.mark.parametrize("indicator", oracle.FFN_INDICATORS)
def test_nan_input_stays_nan_as_in_dense(decision, indicator):
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    x = torch.randn(2, 7)
    x[1, 3] = torch.nan
    y, active, _ = call(x, weights, biases, torch.full((11,), 0.5), decision=decision, drop=6, indicator=indicator)
    assert active[1].all()
    assert y[1].isnan().all()
    assert y[0].isfinite().all()


def test_a_token_does_not_see_its_neighbours():
    weights, biases = oracle.random_ffn(13, 29, torch.float32)
    x = torch.randn(8, 13)
    thresholds = torch.full((29,), 0.4)
    _, together, _ = call(x, weights, biases, thresholds)
    alone = [call(row[None], weights, biases, thresholds)[1][0] for row in x]
    assert torch.equal(together, torch.stack(alone))


def test_strided_weights_and_inputs():
    weights, biases = oracle.random_ffn(16, 24, torch.float32)
    fused = torch.cat([weights[0], weights[1]])
    strided = [fused[:24], fused[24:], weights[2].T.contiguous().T]
    x = torch.randn(4, 32)[:, ::2]
    expected, active, _ = call(x.contiguous(), weights, biases, torch.full((24,), 0.3))
    y, strided_active, _ = call(x, strided, biases, torch.full((24,), 0.3))
    assert torch.equal(active, strided_active)
    assert oracle.relative_error(y, expected.double()) < 1e-6


def test_counters_add_up():
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    counters = torch.tensor([5, 40])
    how = {"decision": "topk", "drop": 4, "indicator": "gate", "activation": "gelu"}
    DISPATCHED.sparse_ffn(torch.randn(2, 3, 7), weights, biases, torch.ones(11), counters, **how)
    assert counters.tolist() == [5 + 6, 40 + 6 * 7]


@pytest.mark.parametrize("decision", ["threshold", "topk"])
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 7), (7,)], ids=str)
def test_opcheck(decision, shape):
    weights, biases = oracle.random_ffn(7, 11, torch.float32, bias=True)
    x, per_neuron = torch.randn(shape), torch.full((11,), 0.5)
    how = {"decision": decision, "drop": 5, "indicator": "coefficient", "activation": "gelu_tanh"}
    counters = torch.zeros(2, dtype=torch.int64)
    tensors, options = arguments(x, weights, biases, **how)
    torch.library.opcheck(torch.ops.countdown.sparse.default, (*tensors, per_neuron, counters, None), options)
    torch.library.opcheck(torch.ops.countdown.select.default, (*tensors, per_neuron, None), options)
    phases = torch.zeros(x.shape[:-1].numel(), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.countdown.sparse.default, (*tensors, per_neuron, counters, phases), options)
    active = torch.rand(*shape[:-1], 11) > 0.5
    form = {name: options[name] for name in ("kind", "formats", "activation")}
    torch.library.opcheck(torch.ops.countdown.given.default, (*tensors, active, counters.clone(), None), form)


def test_given_ffn_is_sparse_ffn_with_its_active_set():
    weights, biases = oracle.random_ffn(7, 11, torch.float32, bias=True)
    x = torch.randn(4, 7)
    y, active, _ = call(x, weights, biases, torch.full((11,), 0.5))
    assert torch.equal(DISPATCHED.given_ffn(x, weights, biases, active, activation="silu"), y)


@pytest.mark.parametrize("ops", [DISPATCHED, REFERENCE])
def test_sets_that_are_given_are_those_of_generated_tokens_alone(ops):
    weights, biases = oracle.random_ffn(7, 11, torch.float32, bias=True)
    x, active, counters = torch.randn(2, 2, 7), torch.rand(2, 2, 11) > 0.5, torch.tensor([5, 40])
    now = torch.tensor([PROMPT, GENERATED, PADDING, GENERATED], dtype=torch.uint8)
    y = ops.given_ffn(x, weights, biases, active, activation="silu", counters=counters, phases=now)
    active[0, 0], active[1, 0] = True, False
    assert torch.equal(y, REFERENCE.given_ffn(x, weights, biases, active, activation="silu"))
    assert counters.tolist() == [5 + 2, 40 + int(active[:, 1].sum())]


def test_drop_smallest_keeps_nan_and_infinity():
    scores = torch.tensor([[torch.nan, 1.0, torch.inf, 0.0, torch.nan]])
    assert reference.drop_smallest(scores, 2).tolist() == [[True, False, True, False, True]]
    assert reference.drop_smallest(scores, 4).tolist() == [[True] * 5]


BAD = {
    "x": ({"x": torch.randn(3, 8)}, "x is"),
    "dtype": ({"weights": [torch.ones(11, 7).long(), torch.ones(11, 7), torch.ones(7, 11)]}, "W_gate is torch.int64"),
    "down": ({"weights": [torch.randn(11, 7), torch.randn(11, 7), torch.randn(11, 7)]}, "W_down is"),
    "bias": ({"biases": [torch.randn(7), None, None]}, "bias of gate"),
    "threshold shape": ({"per_neuron": torch.ones(10)}, "thresholds or multipliers are"),
    "threshold dtype": ({"per_neuron": torch.ones(11).double()}, "thresholds or multipliers are"),
    "decision": ({"decision": "best"}, "rule is 'best'"),
    "drop": ({"drop": 12}, "drop is 12"),
    "activation": ({"activation": "swish"}, "activation is 'swish'"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_arguments_that_do_not_fit_are_named(change, message):
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    arguments = {"x": torch.randn(3, 7), "weights": weights, "biases": biases, "per_neuron": torch.ones(11)}
    with pytest.raises(ValueError, match=message):
        call(**(arguments | change))


def test_unknown_indicator():
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    with pytest.raises(ConfigError, match="selector is 'down'"):
        call(torch.randn(3, 7), weights, biases, torch.ones(11), indicator="down")


def test_unknown_weight_format():
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    tensors, options = arguments(torch.randn(3, 7), weights, biases, activation="silu")
    with pytest.raises(ConfigError, match="weight format is 'int5'"):
        torch.ops.countdown.select(*tensors, torch.ones(11), None, **options | {"formats": ["int5"] * 3})


@pytest.mark.parametrize("x_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_dtype_of_weights_need_not_be_that_of_x(dtype, x_dtype):
    weights, biases = oracle.random_ffn(37, 91, dtype, bias=True)
    x = torch.randn(5, 37).to(x_dtype)
    y, active, _ = call(x, weights, biases, torch.full((91,), 0.3))
    a, u = oracle.projections(x, weights, biases, "silu")
    assert y.dtype == x_dtype
    assert oracle.relative_error(y, oracle.combine(a, u, active, weights, biases)) <= TOLERANCE[x_dtype]


@pytest.mark.parametrize("decision", ["threshold", "topk"])
def test_a_prompt_token_is_dense_and_padding_is_nothing(decision):
    weights, biases = oracle.random_ffn(7, 11, torch.float32, bias=True)
    x = torch.randn(2, 3, 7)
    x[1, 2] = torch.nan
    phases = torch.tensor([GENERATED, PROMPT, PADDING, PROMPT, GENERATED, PADDING], dtype=torch.uint8)
    how = {"decision": decision, "drop": 6, "indicator": "up", "activation": "silu"}
    per_neuron = torch.full((11,), 0.5)
    expected, sets, _ = call(x, weights, biases, per_neuron, **how)
    counters = torch.zeros(2, dtype=torch.int64)
    y = DISPATCHED.sparse_ffn(x, weights, biases, per_neuron, counters, phases=phases, **how)
    active = DISPATCHED.select(x, weights, biases, per_neuron, phases=phases, **how)
    dense = DISPATCHED.given_ffn(x, weights, biases, torch.ones(2, 3, 11).bool(), activation="silu")
    for place, phase in enumerate(phases.tolist()):
        row, token = divmod(place, 3)
        wanted = [expected[row, token], dense[row, token], biases[2]][phase]
        torch.testing.assert_close(y[row, token], wanted)
        assert torch.equal(active[row, token], [sets[row, token], torch.ones(11).bool(), torch.zeros(11).bool()][phase])
    assert counters.tolist() == [2, int(sets[0, 0].sum() + sets[1, 1].sum())]


def test_phases_that_do_not_fit_are_named():
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    uint8 = torch.zeros(6, dtype=torch.uint8)
    for phases in (uint8[:2], uint8.float()[:3], uint8[::2]):
        with pytest.raises(ValueError, match=r"phases is .*, expected contiguous uint8 \(3,\)"):
            DISPATCHED.select(
                torch.randn(3, 7), weights, biases, torch.ones(11), phases=phases, activation="silu", indicator="up"
            )


def test_tensors_on_several_devices_are_named():
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    x, tau, how = torch.randn(3, 7), torch.ones(11), {"activation": "silu", "indicator": "up"}
    counters, phases = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.uint8)
    elsewhere = [weight.to("meta") for weight in weights]
    for call in (
        lambda: DISPATCHED.select(x, weights, biases, tau, phases=phases.to("meta"), **how),
        lambda: DISPATCHED.select(x, weights, biases, tau.to("meta"), **how),
        lambda: DISPATCHED.sparse_ffn(x, weights, biases, tau, counters.to("meta"), **how),
        lambda: DISPATCHED.sparse_ffn(x, [*weights[:2], elsewhere[2]], biases, tau, counters, **how),
        lambda: DISPATCHED.given_ffn(x, weights, biases, torch.ones(3, 11).bool().to("meta"), activation="silu"),
    ):
        with pytest.raises(ValueError, match="x is on cpu, other tensors on meta"):
            call()
