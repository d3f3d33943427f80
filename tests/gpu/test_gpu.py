"""The same on a CUDA device: the ops, capture in a CUDA graph, and whole models. Run with `pytest -m gpu`."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import countdown
import oracle
from calls import DISPATCHED, arguments
from countdown.benchmark.timing import floor_rate
from countdown.calibration.sketch import MagnitudeSketch, PairSketch
from countdown.evaluation.evaluate import evaluate
from countdown.methods import method
from countdown.weights.symmetric import quantise, token_steps
from tiny import FAMILIES

pytestmark = pytest.mark.gpu
OPS = torch.ops.countdown
IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])
# The reference rounds where the dense FFN does, after every product.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def on_gpu(weights, biases):
    return [w.cuda() for w in weights], [None if b is None else b.cuda() for b in biases]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(37, 91), (576, 1536), (1, 1), (640, 2048)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("decision", ["threshold", "topk"])
def test_against_the_oracle(decision, tokens, shape, dtype):
    d, h = shape
    weights, biases = oracle.random_ffn(d, h, dtype, bias=True, seed=d + tokens)
    x = torch.randn(tokens, d).to(dtype)
    how = {"decision": decision, "drop": h // 2, "indicator": "coefficient", "activation": "silu"}
    per_neuron = torch.full((h,), 0.2)
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")
    on_device = on_gpu(weights, biases)
    active = DISPATCHED.select(x.cuda(), *on_device, per_neuron.cuda(), **how)
    y = DISPATCHED.sparse_ffn(x.cuda(), *on_device, per_neuron.cuda(), counters, **how)
    a, u = oracle.projections(x, weights, biases, "silu")
    expected = oracle.combine(a, u, active.cpu(), weights, biases)
    assert oracle.relative_error(y.cpu(), expected) <= TOLERANCE[dtype]
    assert counters.tolist() == [tokens, int(active.sum())]


def test_opcheck():
    weights, biases = on_gpu(*oracle.random_ffn(7, 11, torch.float32, bias=True))
    x, per_neuron = torch.randn(3, 7, device="cuda"), torch.full((11,), 0.5, device="cuda")
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")
    for decision in ("threshold", "topk"):
        how = {"decision": decision, "drop": 5, "indicator": "up", "activation": "gelu_tanh"}
        tensors, options = arguments(x, weights, biases, **how)
        torch.library.opcheck(OPS.sparse.default, (*tensors, per_neuron, counters, None), options)


def test_graph_replay_follows_changing_active_sets():
    weights, biases = on_gpu(*oracle.random_ffn(64, 256, torch.float32))
    x, per_neuron = torch.randn(1, 64, device="cuda"), torch.full((256,), 0.5, device="cuda")
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")
    how = {"decision": "threshold", "drop": 0, "indicator": "up", "activation": "silu"}

    def step():
        return DISPATCHED.sparse_ffn(x, weights, biases, per_neuron, counters, **how)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = set()
    for seed in range(5):
        x.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)))
        counters.zero_()
        captured.fill_(torch.nan)
        graph.replay()
        out, count = captured.clone(), counters.tolist()
        counters.zero_()
        torch.testing.assert_close(out, step())
        assert counters.tolist() == count
        seen.add(count[1])
    assert len(seen) > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=str)
def test_generation_is_that_of_the_cpu(family, more, tokenizer, text):
    model = FAMILIES[family]()
    config = method("m-countdown", sparsity=0.5, weighting="rms")
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    other = copy.deepcopy(model).cuda()
    expected = model.generate(IDS, max_new_tokens=16, do_sample=False, pad_token_id=0)
    out = other.generate(IDS.cuda(), max_new_tokens=16, do_sample=False, pad_token_id=0, **more)
    assert torch.equal(out.cpu(), expected)
    assert {site.tokens for site in countdown.status(other)} == {15}


@pytest.mark.parametrize("protocol", ["all", "decode"])
def test_calibration_and_evaluation_are_those_of_the_cpu(protocol, tokenizer, text):
    model = FAMILIES["llama"]()
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        config = method("m-countdown", sparsity=0.6, weighting="rms")
        profile = countdown.calibrate(model, tokenizer, text, config, tokens=1024, progress=False)
        results.append(evaluate(countdown.sparsify_(model, profile), ids, protocol=protocol, progress=False))
        countdown.restore_(model)
    assert results[0].realised_sparsity == pytest.approx(results[1].realised_sparsity, abs=1e-3)
    assert results[0].perplexity == pytest.approx(results[1].perplexity, rel=1e-2)
    assert results[0].kl == pytest.approx(results[1].kl, rel=2e-2)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shape", [(37, 91), (1536, 8960)], ids=str)
def test_products_of_a_copy_are_exact(bits, shape):
    d, h = shape
    matrix = quantise(torch.randn(h, d), torch.ones(d), bits).to(torch.device("cuda"))
    steps, size = token_steps(torch.randn(2, 40, d, device="cuda"))
    bias = torch.randn(h, device="cuda")
    expected = (steps * size).double() @ matrix.values().double().T + bias
    found = matrix.product_of_steps(steps, size, bias)
    assert found.dtype == torch.float32
    assert oracle.relative_error(found.cpu(), expected.cpu()) <= 1e-5


def test_sketches_are_those_of_the_cpu():
    values = torch.randn(3, 5000)
    on_cpu, on_gpu_ = MagnitudeSketch(), MagnitudeSketch("cuda")
    on_cpu.add(values, values.square())
    on_gpu_.add(values.cuda(), values.cuda().square())
    assert torch.equal(on_gpu_.counts.cpu(), on_cpu.counts)
    torch.testing.assert_close(on_gpu_.losses.cpu(), on_cpu.losses)
    torch.testing.assert_close(on_gpu_.quantile(0.7).cpu(), on_cpu.quantiles(torch.tensor([0.7])))


def test_sketches_of_pairs_are_those_of_the_cpu():
    first, second = torch.randn(2, 3, 5000).abs()
    on_cpu, on_gpu_ = PairSketch(), PairSketch("cuda")
    on_cpu.add(first, second)
    on_gpu_.add(first.cuda(), second.cuda())
    assert torch.equal(on_gpu_.counts.cpu(), on_cpu.counts)
    asked = torch.tensor([0.5, 1.5]), torch.tensor([0.3, 0.05])
    found = on_gpu_.second_quantiles(*(one.cuda() for one in asked))
    torch.testing.assert_close(found.cpu(), on_cpu.second_quantiles(*asked))


def test_what_is_timed_keeps_its_memory():
    rate = floor_rate(torch.device("cuda"))
    gc.collect()
    # These get whatever was freed; a graph that writes there shows.
    others = [torch.zeros(2**26, device="cuda") for _ in range(16)]
    assert rate() > 0
    assert not any(other.any() for other in others)
