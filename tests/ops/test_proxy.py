"""Proxies: what quantising keeps, its packing, and the ops that decide by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from calls import DISPATCHED, arguments
from countdown.weights import symmetric
from countdown.weights.symmetric import SHRINK, Symmetric, Tiles4, halves, quantise, round_tokens, token_steps


def made(weights, bits, importance=None):
    """Gate and up in few bits."""
    importance = torch.ones(weights[0].shape[1]) if importance is None else importance
    return [quantise(weight, importance, bits) for weight in weights[:2]]


def in_tiles(proxy):
    return [part.in_tiles() for part in proxy]


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 200), h=st.integers(1, 20), bits=st.sampled_from([3, 4]), seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_unpacking_gives_what_the_packing_means(d, h, bits, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(h, d, generator=generator).to(dtype)
    matrix = quantise(weight, torch.rand(d, generator=generator), bits)
    unpacked = matrix.values()
    assert torch.equal(unpacked.double(), oracle.proxy_weights(*matrix.parts, d, bits))
    # No weight is further from its own than half a step of the largest range, or than what shrinking cut off.
    reach = weight.float().abs().max()
    assert (unpacked - weight.float()).abs().max() <= 0.45 * reach


@pytest.mark.parametrize("bits", [3, 4])
def test_weights_on_the_grid_are_kept(bits):
    levels = torch.arange(64).remainder(2**bits) - 2 ** (bits - 1) + 0.5
    weight = torch.stack([levels * 0.25, -levels * 3.0])
    matrix = quantise(weight, torch.ones(64), bits)
    assert torch.equal(matrix.values(), weight)


def test_the_scale_is_the_best_of_those_tried():
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(7, 64, generator=generator), torch.rand(64, generator=generator) ** 4
    matrix = quantise(weight, importance, 4)
    kept = (matrix.values() - weight).square() @ importance
    for shrink in SHRINK:
        scale = (shrink * weight.abs().amax(1, keepdim=True) / 7.5).half().float()
        tried = ((weight / scale - 0.5).round().clamp(-8, 7) + 0.5) * scale
        assert (kept <= (tried - weight).square() @ importance + 1e-6).all()


def test_columns_of_large_inputs_are_kept_better():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(200, 64, generator=generator)
    importance = torch.ones(64)
    importance[:8] = 100
    errors = []
    for cost in (torch.ones(64), importance):
        matrix = quantise(weight, cost, 3)
        errors.append((matrix.values() - weight)[:, :8].square().mean())
    assert errors[1] < errors[0]


def test_the_same_weights_give_the_same_proxy_in_every_dtype():
    weight = torch.randn(9, 100).bfloat16()
    one, other = (quantise(w, torch.ones(100), 4) for w in (weight, weight.float()))
    assert all(torch.equal(a, b) for a, b in zip(one.parts, other.parts, strict=True))


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-6])
def test_small_weights_keep_their_proportions(size):
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)) * size
    matrix = quantise(weight, torch.ones(64), 4)
    unpacked = matrix.values()
    assert oracle.relative_error(unpacked, weight.double()) < 0.12


def test_zeros_stay_near_zero():
    matrix = quantise(torch.zeros(3, 70), torch.zeros(70), 4)
    assert (matrix.values() == 0).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_bytes(bits):
    matrix = quantise(torch.randn(16, 256), torch.ones(256), bits)
    assert matrix.nbytes == 16 * 256 * (bits + 16 / 64) / 8 == Symmetric.__subclasses__()[bits - 3].bytes_of(16, 256)


@pytest.mark.parametrize("bits", [3, 4])
def test_products_of_a_copy_are_the_same_in_blocks_of_rows(bits, monkeypatch):
    matrix = quantise(torch.randn(37, 100), torch.ones(100), bits)
    x, bias = torch.randn(2, 3, 100), torch.randn(37)
    expected = x.double() @ matrix.values().double().T + bias
    unpacked: list[int] = []
    monkeypatch.setattr(type(matrix), "values", lambda self: unpacked.append(self.shape[0]) or Symmetric.values(self))
    for values, blocks in ((1 << 20, [37]), (500, [5] * 7 + [2]), (1, [1] * 37)):
        monkeypatch.setattr(symmetric, "_CPU_VALUES", values)
        unpacked.clear()
        torch.testing.assert_close(matrix.product(x, bias).double(), expected, rtol=1e-4, atol=1e-4)
        assert unpacked == blocks


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("leading", [(), (0,), (7,), (2, 3)], ids=str)
def test_products_of_steps_in_two_halves(leading, bits, monkeypatch):
    # What a GPU does, but for the product itself, which a CPU sums in float32 when its inputs are.
    monkeypatch.setattr(symmetric, "_multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    matrix = quantise(torch.randn(37, 100), torch.ones(100), bits)
    steps, size = token_steps(torch.randn(*leading, 100))
    bias = torch.randn(37)
    expected = (steps * size).double() @ matrix.values().double().T + bias
    torch.testing.assert_close(matrix.product_of_steps(steps, size, bias).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e4])
def test_two_halves_in_bfloat16_hold_a_copy_exactly(bits, size):
    values = quantise(torch.randn(50, 128) * size, torch.ones(128), bits).values()
    both = halves(values)
    assert (both.dtype, both.shape) == (torch.bfloat16, (50, 256))
    high, low = both.split(128, dim=1)
    assert torch.equal(high.double() + low.double(), values.double())
    steps, of_size = token_steps(torch.randn(9, 128) * size)
    assert torch.equal(steps.bfloat16().float(), steps)
    assert steps.abs().max() == 127
    assert (of_size > 0).all()


def test_round_tokens():
    x = torch.randn(4, 33) * torch.tensor([[1.0], [1e-3], [1e4], [0.0]])
    rounded = round_tokens(x)
    assert ((rounded - x).abs() <= x.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert torch.equal(rounded[3], x[3])


@pytest.mark.parametrize("decision", ["threshold", "topk"])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_op_decides_by_the_proxy_and_computes_exactly(bias, bits, decision):
    weights, biases = oracle.random_ffn(37, 23, torch.float32, bias=bias)
    proxy, x = made(weights, bits), torch.randn(3, 37)
    how = {"decision": decision, "drop": 14, "indicator": f"proxy-{bits}", "activation": "silu", "proxy": proxy}
    per_neuron, counters = torch.full((23,), 0.11 if decision == "threshold" else 1.0), torch.zeros(2).long()
    active = DISPATCHED.select(x, weights, biases, per_neuron, **how)
    y = DISPATCHED.sparse_ffn(x, weights, biases, per_neuron, counters, **how)
    a, u = oracle.proxy_factors(x, proxy, biases, "silu")
    value = (a * u).abs()
    if decision == "threshold":
        assert torch.equal(active, value > 0.11)
    else:
        assert active.tolist() == [oracle.topk_active(row, 14) for row in value.tolist()]
    exact = oracle.projections(x, weights, biases, "silu")
    assert oracle.relative_error(y, oracle.combine(*exact, active, weights, biases)) < 1e-5
    assert counters.tolist() == [3, int(active.sum())]
    tensors, options = arguments(x, weights, biases, **how)
    torch.library.opcheck(torch.ops.countdown.sparse.default, (*tensors, per_neuron, counters, None), options)


def test_more_bits_find_more_of_what_matters():
    weights, _ = oracle.random_ffn(256, 1000, torch.float32)
    x = torch.randn(16, 256)
    a, u = oracle.projections(x, weights, [None] * 3, "silu")
    best = (a * u).abs().topk(200).indices
    recalls = []
    for bits in (3, 4):
        how = {"decision": "topk", "drop": 800, "indicator": f"proxy-{bits}", "activation": "silu"}
        active = DISPATCHED.select(x, weights, [None] * 3, torch.ones(1000), **how, proxy=made(weights, bits))
        recalls.append(active.gather(1, best).float().mean().item())
    assert 0.7 < recalls[0] < recalls[1]
    assert recalls[1] > 0.85


BAD = {
    "missing": (None, "proxy-4", "formats has 3 entries, expected one for each of 5 weights"),
    "for another": ("made", "up", "formats has 5 entries, expected one for each of 3 weights"),
    "one of two": ("short", "proxy-4", "formats has 4 entries, expected one for each of 5 weights"),
    "other shape": ("other", "proxy-4", r"a part of selector 'proxy-4' has levels .* do not fit \(11, 7\) in 4 bits"),
    "rows and tiles": ("mixed", "proxy-4", "have formats symmetric-4, symmetric-4-tiles, not its own"),
    "other bits": ("bits", "proxy-4", "have formats symmetric-4, symmetric-3, not its own"),
}


@pytest.mark.parametrize("kind, indicator, message", BAD.values(), ids=BAD)
def test_proxies_that_do_not_fit_are_named(kind, indicator, message):
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    proxy = None if kind is None else made(weights, 4)
    if kind == "short":
        proxy = proxy[:1]
    if kind == "mixed":
        proxy = [proxy[0], proxy[1].in_tiles()]
    if kind == "bits":
        proxy = [proxy[0], made(weights, 3)[1]]
    if kind == "other":
        proxy = made(oracle.random_ffn(7, 12, torch.float32)[0], 4)
    how = {"decision": "threshold", "drop": 0, "indicator": indicator, "activation": "silu", "proxy": proxy}
    with pytest.raises(ValueError, match=message):
        DISPATCHED.select(torch.randn(1, 7), weights, biases, torch.ones(11), **how)


def test_parts_that_are_missing_are_named():
    weights, biases = oracle.random_ffn(7, 11, torch.float32)
    how = {"indicator": "proxy-4", "activation": "silu", "proxy": made(weights, 4)}
    (x, tensors, none), options = arguments(torch.randn(1, 7), weights, biases, **how)
    with pytest.raises(ValueError, match="weights has 6 tensors, which are not those of plain, plain, plain, symm"):
        torch.ops.countdown.select(x, tensors[:-1], none, torch.ones(11), None, **options)


@pytest.mark.parametrize("d", [8, 40, 64, 100])
@pytest.mark.parametrize("h", [1, 15, 16, 17, 53])
def test_tiles_hold_the_same_and_give_the_rows_back(h, d):
    for rows in made([torch.randn(h, d) for _ in range(2)], 4):
        tiles = rows.in_tiles()
        (levels, scales), neuron = tiles.parts, h - 1
        assert torch.equal(levels[neuron // 16, :, neuron % 16].flatten(), rows.parts[0][neuron])
        assert torch.equal(scales[neuron // 16, :, neuron % 16], rows.parts[1][neuron])
        assert not scales.mT.flatten(0, 1)[h:].any()
        assert all(torch.equal(one, other) for one, other in zip(tiles.in_rows().parts, rows.parts, strict=True))
        assert torch.equal(tiles.values(), rows.values())
        assert tiles.in_tiles() is tiles
        assert rows.in_rows() is rows


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_ops_take_rows_and_tiles(tokens):
    weights, biases = oracle.random_ffn(37, 23, torch.float32, bias=True)
    weights[2] = weights[2].t().contiguous().t()  # for the kernels of a CPU
    proxy, x, thresholds = made(weights, 4), torch.randn(tokens, 37), torch.full((23,), 0.11)
    how = {"decision": "threshold", "drop": 0, "indicator": "proxy-4", "activation": "silu"}
    results = []
    for form in (proxy, in_tiles(proxy)):
        counters = torch.zeros(2).long()
        y = DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counters, proxy=form, **how)
        results.append((y, counters, DISPATCHED.select(x, weights, biases, thresholds, proxy=form, **how)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    few = [Tiles4([tensor[:1] for tensor in part.parts], part.shape) for part in in_tiles(proxy)]
    with pytest.raises(ValueError, match=r"do not fit \(23, 37\) in 4 bits"):
        DISPATCHED.select(x, weights, biases, thresholds, proxy=few, **how)
