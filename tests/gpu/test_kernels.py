"""The Triton kernels on a GPU: shapes of real models, bits, capture, compiled generation, storage."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")

from torch import nn
from transformers import AutoModelForCausalLM

import countdown
import kernel_cases as cases
from calls import DISPATCHED, arguments
from countdown.decoding import DecodeLoop
from countdown.loading import Source, load_model, load_tokenizer
from countdown.methods import method
from countdown.ops.triton.backend import Triton
from countdown.phase import GENERATED, PADDING, PROMPT
from countdown.profiles.profile import Profile
from tiny import FAMILIES, llama

pytestmark = pytest.mark.gpu
OPS = torch.ops.countdown
IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])
HOW = {"decision": "threshold", "drop": 0, "indicator": "up", "activation": "silu"}


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 91), (576, 1536), (1031, 2053)], ids=str)
@pytest.mark.parametrize("indicator", ["up", "gate"])
def test_against_float64(indicator, shape, dtype, tokens):
    cases.check_sparse(tokens, *shape, dtype, "cuda", indicator=indicator, activation="gelu_tanh", share=0.7, bias=True)


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 91), (576, 1536), (1031, 2053)], ids=str)
def test_proxies_against_float64(shape, dtype, tokens):
    cases.check_proxy(tokens, *shape, dtype, "cuda", activation="gelu_tanh", share=0.7, bias=True)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 91), (576, 192), (1031, 2053), (4096, 6144), (14336, 4096)], ids=str)
def test_linears_against_float64(shape, dtype, tokens):
    cases.check_linear(tokens, *shape, dtype, "cuda", share=0.5, bias=True)


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("rank", [0, 1, 20, 205])
@pytest.mark.parametrize("shape", [(37, 91), (1031, 2053), (4096, 1024)], ids=str)
def test_low_ranks_for_dropped_channels(shape, rank, tokens):
    cases.check_linear(tokens, *shape, torch.bfloat16, "cuda", share=0.5, bias=True, rank=rank)


@pytest.mark.parametrize("shape", [(4096, 28672), (8192, 57344), (53248, 1024)], ids=str)
def test_linears_of_large_models(shape):
    cases.check_linear(1, *shape, torch.bfloat16, "cuda", share=0.5)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_linears_in_phases(tokens):
    phases = [(tokens + place) % 3 for place in range(tokens)]
    cases.check_linear(tokens, 700, 300, torch.float16, "cuda", share=0.6, phases=phases, bias=True, seed=tokens)


@pytest.mark.parametrize("heights", [[96], [40, 2100], [4096, 1024, 1024]], ids=str)
@pytest.mark.parametrize("ranked", [False, True])
def test_linears_together(heights, ranked):
    ranks = [20, 1, 33][: len(heights)] if ranked else None
    cases.check_together(1, 4096, heights, torch.bfloat16, "cuda", OPS.sparse_together, ranks)


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("by", ["up", "proxy-4"])
@pytest.mark.parametrize(
    "shape",
    [(640, 2048), (896, 4864), (1536, 8960), (3584, 14336), (4096, 14336), (5120, 13824), (5120, 17920), (8192, 28672)],
    ids=str,
)
def test_shapes_of_real_models(shape, by, tokens):
    how = {"activation": "silu", "share": 0.8}
    if by == "proxy-4":
        cases.check_proxy(tokens, *shape, torch.bfloat16, "cuda", **how)
    else:
        cases.check_sparse(tokens, *shape, torch.bfloat16, "cuda", indicator=by, **how)


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_many_neurons_in_float32(tokens):
    # From 8448 neurons on an H200, tiles are of other sizes.
    cases.check_sparse(tokens, 1024, 14336, torch.float32, "cuda", indicator="up", activation="silu", share=0.8)


@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", Triton.activations)
@pytest.mark.parametrize("form", ["split", "fused", "interleaved"])
def test_activations(form, activation, dtype):
    for tokens in (1, 3):
        cases.check_sparse(
            tokens, 200, 501, dtype, "cuda", indicator="gate", activation=activation, share=0.5, form=form
        )


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.999, 1.0])
def test_all_one_and_none_active(share, tokens):
    cases.check_sparse(tokens, 576, 1536, torch.float32, "cuda", indicator="up", activation="silu", share=share)


@pytest.mark.parametrize("by", ["up", "proxy-4"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_the_same_bits_every_time(tokens, by):
    weights, biases = cases.ffn(1024, 4096, torch.bfloat16, "cuda")
    how = HOW | {"indicator": by, "proxy": cases.proxy_of(weights) if by == "proxy-4" else None}
    x = cases.inputs(tokens, 1024, torch.bfloat16, "cuda", 0)
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")
    thresholds = torch.full((4096,), 0.3, device="cuda")
    results = [DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counters, **how) for _ in range(21)]
    active = DISPATCHED.select(x, weights, biases, thresholds, **how)
    given = [DISPATCHED.given_ffn(x, weights, biases, active, activation="silu") for _ in range(21)]
    for some in (results, given):
        assert all(torch.equal(some[0], other) for other in some[1:])
    assert counters.tolist() == [21 * tokens, 21 * int(active.sum())]


@pytest.mark.parametrize("phases", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_opcheck(tokens, phases):
    weights, biases = cases.ffn(32, 50, torch.float32, "cuda", bias=True)
    x, per_neuron = torch.randn(tokens, 32, device="cuda"), torch.full((50,), 0.5, device="cuda")
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")
    now = torch.arange(tokens, device="cuda").to(torch.uint8) if phases else None
    tensors, options = arguments(x, weights, biases, **HOW)
    torch.library.opcheck(OPS.sparse.default, (*tensors, per_neuron, counters, now), options)
    torch.library.opcheck(OPS.select.default, (*tensors, per_neuron, now), options)
    active = torch.rand(tokens, 50, device="cuda") > 0.5
    form = {name: options[name] for name in ("kind", "formats", "activation")}
    torch.library.opcheck(OPS.given.default, (*tensors, active, None, None), form)


@pytest.mark.parametrize("by", Triton.selectors["ffn"])
@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
def test_phases(dtype, tokens, by):
    for first in (GENERATED, PROMPT, PADDING):
        phases = [(first + place) % 3 for place in range(tokens)]
        cases.check_phases(phases, 576, 1536, dtype, "cuda", by=by, seed=tokens)


@pytest.mark.parametrize("by", Triton.selectors["ffn"])
@pytest.mark.parametrize("shape", [(37, 91), (576, 1536), (4096, 14336)], ids=str)
@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
def test_what_is_predicted(dtype, shape, by):
    for tokens in (1, 2, 5, 8):
        phases = [(place * place) % 3 for place in range(tokens)]
        cases.check_affine(tokens, *shape, dtype, "cuda", by=by, phases=phases, bias=True, seed=tokens)


@pytest.mark.parametrize("by", Triton.selectors["ffn"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
def test_tokens_and_weights_of_different_dtypes(dtype, tokens, by):
    for other in cases.TOLERANCE:
        cases.check_mixed(tokens, 576, 1536, dtype, [other] * 3, "cuda", by=by)
    each = [torch.bfloat16, torch.float32, torch.float16]
    cases.check_mixed(tokens, 1031, 2053, dtype, each, "cuda", by=by)


@pytest.mark.parametrize("by", Triton.selectors["ffn"])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_graph_replay_sees_changed_phases(tokens, by):
    weights, biases = cases.ffn(256, 1024, torch.bfloat16, "cuda", bias=True)
    x = cases.inputs(tokens, 256, torch.bfloat16, "cuda", 0)
    how, thresholds, _ = cases.decided(by, x, weights, biases, 0.6)
    phases = torch.zeros(tokens, dtype=torch.uint8, device="cuda")
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")

    def step():
        return DISPATCHED.sparse_ffn(x, weights, biases, thresholds, counters, phases=phases, **how)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for now in (GENERATED, PROMPT, PADDING):
        phases.fill_(GENERATED)
        phases[-1] = now
        counters.zero_()
        captured.fill_(torch.nan)
        graph.replay()
        out, count = captured.clone(), counters.tolist()
        counters.zero_()
        assert torch.equal(out, step())
        assert counters.tolist() == count
        assert count[0] == tokens - (now != GENERATED)
        seen.append(out[-1])
    assert torch.equal(seen[2], biases[2])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("by", ["up", "proxy-4"])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_graph_replay_follows_changing_active_sets(tokens, by):
    weights, biases = cases.ffn(256, 1024, torch.bfloat16, "cuda")
    how = HOW | {"indicator": by, "proxy": cases.proxy_of(weights) if by == "proxy-4" else None}
    x = cases.inputs(tokens, 256, torch.bfloat16, "cuda", 0)
    per_neuron = torch.full((1024,), 0.3, device="cuda")
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")

    def step():
        return DISPATCHED.sparse_ffn(x, weights, biases, per_neuron, counters, **how)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = set()
    for seed in range(5):
        x.copy_(cases.inputs(tokens, 256, torch.bfloat16, "cuda", seed))
        captured.fill_(torch.nan)
        counters.zero_()
        graph.replay()
        out, count = captured.clone(), counters.tolist()
        counters.zero_()
        assert torch.equal(out, step())
        assert counters.tolist() == count
        seen.add(count[1])
    assert len(seen) > 1


@pytest.fixture
def sparse(tokenizer, text):
    """A small model in float32 on the GPU, sparse, and the same dense."""
    model = llama().cuda()
    config = method("m-countdown", sparsity=0.5, weighting="rms")
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)
    dense = copy.deepcopy(model)
    return countdown.sparsify_(model, profile), dense, profile


def test_static_cache_generation_is_compiled_and_the_same(sparse):
    from torch._dynamo.utils import counters

    model, *_ = sparse
    more = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(IDS.cuda(), **more)
    torch._dynamo.reset()
    counters.clear()
    countdown.reset_counters(model)
    static = model.generate(IDS.cuda(), cache_implementation="static", **more)
    assert torch.equal(eager, static)
    assert counters["stats"]["unique_graphs"] >= 1  # compiled code ran
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] >= 1
    assert not counters["graph_break"]
    assert {site.tokens for site in countdown.status(model)} == {15}
    assert {site.backend for site in countdown.status(model)} == {"triton"}


@pytest.mark.parametrize("name", [None, "m-countdown", "d-proxy", "teal"])
def test_the_decode_loop_writes_what_generate_writes(name, tokenizer, text):
    model = llama(num_attention_heads=4, num_key_value_heads=2).cuda()
    if name:
        config = method(name, sparsity=0.5)
        countdown.sparsify_(model, countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False))
    expected = model.generate(IDS.cuda(), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    loop = DecodeLoop(model, IDS.cuda(), new_tokens=40)
    assert torch.equal(torch.cat([loop.run(7), loop.run(33)]), expected)


def test_down_is_stored_by_neuron_once(sparse):
    model, dense, _ = sparse
    for (name, laid), (_, plain) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert torch.equal(laid, plain)
        assert laid.t().is_contiguous() == ("down_proj" in name) or laid.dim() == 1
    again = copy.deepcopy(model)
    moved = copy.deepcopy(model).cpu().cuda()
    for other in (again, moved):
        assert other.model.layers[0].mlp.down_proj.weight.stride(0) == 1
        assert {site.backend for site in countdown.status(other)} == {"triton"}
        out = other.generate(IDS.cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(out, model.generate(IDS.cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0))
    with torch.no_grad():
        expected = dense(IDS.cuda()).logits
        countdown.restore_(model)
        assert torch.equal(model(IDS.cuda()).logits, expected)
    assert all(p.is_contiguous() for p in model.parameters())


def test_saved_from_the_gpu_it_loads_sparse_and_dense(sparse, tmp_path):
    model, dense, _ = sparse
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").cuda().eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS.cuda()).logits, dense(IDS.cuda()).logits)
    loaded = countdown.from_pretrained(str(tmp_path / "saved"), device="cuda")
    more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS.cuda(), **more), model.generate(IDS.cuda(), **more))


def test_packing_needs_one_layer_more(tokenizer, text):
    model = llama(hidden_size=512, intermediate_size=4096, num_hidden_layers=6).cuda()
    config = method("m-countdown", sparsity=0.5)
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)
    layer = 3 * 512 * 4096 * 4
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    countdown.sparsify_(model, profile)
    assert torch.cuda.max_memory_allocated() - before <= layer
    assert torch.cuda.memory_allocated() - before <= layer // 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_generates_what_its_sequences_do_alone(family, tokenizer, text):
    model = FAMILIES[family]().cuda()
    profile = countdown.calibrate(
        model, tokenizer, text, method("cats", sparsity=0.6, weighting="rms"), tokens=512, progress=False
    )
    countdown.sparsify_(model, profile)
    more = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(3)).cuda()
    together = model.generate(ids, **more)
    alone = [model.generate(row[None], **more)[0] for row in ids]
    assert torch.equal(together, torch.stack(alone))


def test_what_the_gpu_leaves_to_the_reference_is_said(sparse, caplog):
    model, _, profile = sparse
    countdown.restore_(model)
    countdown.sparsify_(model, profile.with_settings(decision="topk"))
    assert "leaves 3 modules (model.layers.0.mlp, ...) to the reference: decision 'topk' needs a sort" in caplog.text
    assert {site.backend for site in countdown.status(model)} == {"reference"}


def test_an_explicit_backend_that_cannot_fails(sparse, monkeypatch):
    model, _, profile = sparse
    countdown.restore_(model)
    monkeypatch.setenv("COUNTDOWN_BACKEND", "triton")
    with pytest.raises(countdown.ConfigError, match=r"'triton', which cannot compute .*topk"):
        countdown.sparsify_(model, profile.with_settings(decision="topk"))
    assert all(p.is_contiguous() for p in model.parameters())
    countdown.sparsify_(model, profile)
    monkeypatch.setenv("COUNTDOWN_BACKEND", "reference")
    assert {site.backend for site in countdown.status(model)} == {"reference"}


def test_smollm2_writes_on_the_gpu_what_it_writes_on_the_cpu(tokenizer):
    from countdown.demo import find_model

    source = Source.parse(str(find_model()))
    own = load_tokenizer(source)
    texts = countdown.load_text("python-docs", "calibration")
    ids = own("The capital of France is", return_tensors="pt")["input_ids"]
    cpu = load_model(source, dtype="float32", device="cpu")
    profile: Profile = countdown.calibrate(
        cpu, own, texts, method("m-countdown", sparsity=0.5, weighting="rms"), tokens=2048, progress=False
    )
    more = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    countdown.sparsify_(cpu, profile)
    expected = cpu.generate(ids, **more)
    gpu: nn.Module = countdown.restore_(cpu).cuda()
    countdown.sparsify_(gpu, profile)
    assert torch.equal(gpu.generate(ids.cuda(), **more).cpu(), expected)
    assert {site.backend for site in countdown.status(gpu)} == {"triton"}
