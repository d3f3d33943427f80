"""Sparsified models: the same interface, the right tokens sparse, and back to the bit."""

from __future__ import annotations

import copy
import math
import pickle

import accelerate
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import countdown
import oracle
from countdown import modules, sparsify
from countdown.cost import beside_bytes
from countdown.errors import AccidentError, ConfigError, ProfileError, UnsupportedModelError
from countdown.loading import cache_argument
from countdown.methods import method, method_class, method_names
from countdown.modules import SparseModule, sparse_modules
from countdown.ops.cpu import library
from countdown.sites import find_sites
from countdown.sites.ffn import find_ffns
from countdown.sites.holders import PlainLinear
from countdown.weights import symmetric
from tiny import FAMILIES, llama

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])


def calibrated(model, tokenizer, text, **settings):
    name = settings.pop("name", "m-countdown")
    return countdown.calibrate(model, tokenizer, text, method(name, **settings), tokens=512, progress=False)


@pytest.fixture
def profile(llama_model, tokenizer, text):
    return calibrated(llama_model, tokenizer, text, sparsity=0.5, weighting="rms")


def tensors(module):
    return [tensor for part in module.parts for tensor in part.parts]


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(ids, **more).logits


EVERY = [
    (name, decision, weighting)
    for name in method_names()
    if not method(name).selector.from_prompt
    for decision in method_class(name).decisions
    for weighting in method_class(name).weightings
]


@pytest.mark.parametrize("name, decision, weighting", EVERY, ids=["-".join(row) for row in EVERY])
def test_a_sparse_model_is_the_dense_one_with_masked_coefficients(name, decision, weighting, model, tokenizer, text):
    profile = calibrated(model, tokenizer, text, name=name, decision=decision, weighting=weighting, sparsity=0.6)
    masked = copy.deepcopy(model)
    countdown.sparsify_(model, profile, apply_to="all")
    sites = {site.name: site for site in find_sites(masked, profile.kinds)}
    for name, module in sparse_modules(model).items():
        sites[name].module.forward = _masked_forward(sites[name], module)
    assert oracle.relative_error(logits(model), logits(masked).double()) < 1e-5
    assert 0.3 < countdown.status(model)[0].realised_sparsity < 0.9


def _masked_forward(site, module):
    """The dense forward with a mask from the definitions, written without the ops."""

    def forward(x):
        factors = seen = site.sum.project(x)
        if module.parts:
            seen = oracle.proxy_factors(x[0], module.parts, site.sum.biases, site.activation)
            seen = [factor.float()[None] for factor in seen]
        value = oracle.INDICATOR[module.selector.name](*seen)
        if module.method.decision == "threshold":
            active = value > module.per_term
        else:
            ranked = (value * module.per_term).argsort(dim=-1, stable=True)
            active = torch.ones_like(value, dtype=torch.bool)
            active.scatter_(-1, ranked[..., : module.method.drop(module.terms)], False)
        coefficients = math.prod(factors, start=1.0)
        return site.sum.combine(coefficients * active)

    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_same_bits(family, dtype, tokenizer, text):
    model = FAMILIES[family](dtype)
    before, modules = logits(model), dict(model.named_modules())
    countdown.sparsify_(model, calibrated(model, tokenizer, text, sparsity=0.7), apply_to="all")
    assert not torch.equal(logits(model), before)
    assert countdown.restore_(model) is model
    assert torch.equal(logits(model), before)
    assert all(module is modules[name] for name, module in model.named_modules())


def test_sparsity_zero_gives_the_dense_bits(on_reference, model, tokenizer, text):
    before = logits(model)
    countdown.sparsify_(model, calibrated(model, tokenizer, text, weighting="rms"), apply_to="all", sparsity=0.0)
    assert torch.equal(logits(model), before)
    assert countdown.status(model)[0].realised_sparsity == 0.0


def test_under_decode_the_prompt_is_dense_and_generated_tokens_are_sparse(llama_model, profile):
    dense = logits(llama_model)
    with torch.no_grad():
        cache = llama_model(IDS[:, :-1], use_cache=True).past_key_values
    countdown.sparsify_(llama_model, profile)
    assert torch.equal(logits(llama_model), dense)
    assert all(site.tokens == 0 for site in countdown.status(llama_model))
    step = logits(llama_model, IDS[:, -1:], **cache_argument(llama_model, cache))
    assert all(site.tokens == 1 for site in countdown.status(llama_model))
    assert not torch.allclose(step[:, 0], dense[:, -1])


def test_batch_mates_do_not_change_a_token(llama_model, profile):
    countdown.sparsify_(llama_model, profile, apply_to="all")
    batch = torch.randint(0, 256, (6, 8), generator=torch.Generator().manual_seed(3))
    together = logits(llama_model, batch)
    for row in range(6):
        torch.testing.assert_close(together[row : row + 1], logits(llama_model, batch[row : row + 1]))


@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}], ids=str
)
def test_generate_works_unchanged(more, llama_model, profile):
    countdown.sparsify_(llama_model, profile)
    torch.manual_seed(0)
    out = llama_model.generate(IDS, max_new_tokens=6, pad_token_id=0, **more)
    assert out.shape == (1, 14)
    expected = 5 * (3 if "num_beams" in more else 1)
    assert all(site.tokens == expected for site in countdown.status(llama_model))


def test_sparse_generation_is_what_one_step_at_a_time_gives(llama_model, profile):
    countdown.sparsify_(llama_model, profile)
    out = llama_model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 8:]
    with torch.no_grad():
        result, expected = llama_model(IDS, use_cache=True), []
        for _ in range(8):
            expected.append(result.logits[0, -1].argmax().item())
            token = torch.tensor([[expected[-1]]])
            result = llama_model(token, **cache_argument(llama_model, result.past_key_values), use_cache=True)
    assert out.tolist() == expected


def test_names_parameters_and_state_dict_stay(on_reference, llama_model, profile):
    before = {name: tensor.data_ptr() for name, tensor in llama_model.state_dict().items()}
    parameters = [name for name, _ in llama_model.named_parameters()]
    countdown.sparsify_(llama_model, profile)
    assert {name: tensor.data_ptr() for name, tensor in llama_model.state_dict().items()} == before
    assert list(llama_model.state_dict()) == list(before)
    assert [name for name, _ in llama_model.named_parameters()] == parameters


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used_never_stale_ones(assign, on_reference, llama_model, profile):
    countdown.sparsify_(llama_model, profile, apply_to="all")
    other = copy.deepcopy(llama_model.state_dict())
    for name in other:
        if "down_proj" in name:
            other[name] = -other[name]
    before = logits(llama_model)
    llama_model.load_state_dict(other, assign=assign)
    assert not torch.allclose(logits(llama_model), before)
    sparse = logits(llama_model)
    for module in sparse_modules(llama_model).values():
        module.per_term.fill_(-1)
    dense = logits(llama_model)
    countdown.restore_(llama_model)
    assert torch.equal(logits(llama_model), dense)
    assert not torch.equal(sparse, dense)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_get_a_proxy_of_their_own(assign, llama_model, tokenizer, text):
    profile = calibrated(llama_model, tokenizer, text, name="d-proxy", sparsity=0.6, decision="topk")
    other = {name: -value if "gate" in name else value.flip(0) if "up_proj" in name else value
             for name, value in copy.deepcopy(llama_model.state_dict()).items()}  # fmt: skip
    anew = copy.deepcopy(llama_model)
    anew.load_state_dict(other)
    with pytest.warns(countdown.ProfileWarning, match="the weights differ"):
        countdown.sparsify_(anew, profile, apply_to="all")
    countdown.sparsify_(llama_model, profile, apply_to="all")
    llama_model.load_state_dict(other, assign=assign)
    assert torch.equal(logits(llama_model), logits(anew))


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_to_lay_proxies_out_says_so(error, monkeypatch, tokenizer, text):
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("d-proxy"), tokens=512, progress=False)
    expected = logits(model)

    def fail(*_):
        raise error

    monkeypatch.setattr(symmetric.Symmetric4, "in_rows" if library.missing() else "in_tiles", fail)
    with pytest.raises(AccidentError, match="memory ran out while deriving weights"):
        countdown.sparsify_(model, profile)
    assert not sparse_modules(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_for_proxies_says_how_much(error, monkeypatch, tokenizer, text):
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("d-proxy"), tokens=512, progress=False)

    def fail(*_):
        raise error

    monkeypatch.setattr(symmetric, "quantise", fail)
    size = beside_bytes(find_ffns(model), method("d-proxy"))
    message = f"memory ran out while deriving weights, which take {size / 1e9:.2f} GB beside the model's"
    with pytest.raises(AccidentError, match=message):
        countdown.sparsify_(model, profile)
    assert not sparse_modules(model)
    with pytest.raises(AccidentError, match=message):
        countdown.calibrate(model, tokenizer, text, method("d-proxy"), tokens=512, progress=False)


def test_a_proxy_follows_copies_and_survives_casts(llama_model, tokenizer, text, monkeypatch):
    profile = calibrated(llama_model, tokenizer, text, name="d-proxy", sparsity=0.6)
    countdown.sparsify_(llama_model, profile, apply_to="all")
    expected = logits(llama_model)
    assert torch.equal(logits(copy.deepcopy(llama_model)), expected)
    again = copy.deepcopy(llama_model).half().float()
    for one, other in zip(*(sparse_modules(m).values() for m in (llama_model, again)), strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors(one), tensors(other), strict=True))
    compiled = torch.compile(llama_model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(IDS).logits, expected)
    torch._dynamo.reset()  # or the next test would find what was compiled here
    row = 4 * 32 // 8 + 2  # 24 weights in one group of 32
    assert (
        beside_bytes(find_ffns(countdown.restore_(copy.deepcopy(llama_model))), method("d-proxy")) == 3 * 2 * 53 * row
    )
    stored = 53 if library.missing() else 64  # in tiles of 16
    assert sum(site.beside_bytes for site in countdown.status(llama_model)) == 3 * 2 * stored * row
    monkeypatch.setenv("COUNTDOWN_BACKEND", "reference")
    rows = llama_model.to("cpu")
    assert sum(site.beside_bytes for site in countdown.status(rows)) == 3 * 2 * 53 * row
    torch.testing.assert_close(logits(rows), expected)
    monkeypatch.delenv("COUNTDOWN_BACKEND")
    with torch.inference_mode():
        again = rows.to("cpu")
    assert sum(site.beside_bytes for site in countdown.status(again)) == 3 * 2 * stored * row
    assert not any(part.is_inference() for site in sparse_modules(again).values() for part in tensors(site))


def test_deepcopy_is_independent(llama_model, profile):
    countdown.sparsify_(llama_model, profile, apply_to="all")
    before = logits(llama_model)
    other = copy.deepcopy(llama_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(llama_model), before)
    countdown.restore_(other)
    assert torch.equal(logits(llama_model), before)
    assert other.model.layers[0].mlp.up_proj.weight.eq(0).all()


def test_a_twin_shares_all_but_down_and_leaves_the_model_alone(laid_out, llama_model, profile):
    before, downs = logits(llama_model), {ffn.module.down_proj.weight for ffn in find_ffns(llama_model)}
    twin = sparsify.sparse_twin(llama_model, profile)
    assert (bool(sparse_modules(twin)), bool(sparse_modules(llama_model))) == (True, False)
    for mine, its in zip(llama_model.parameters(), twin.parameters(), strict=True):
        assert (mine is its) == (mine not in downs)
    assert (any(by_neuron(llama_model)), all(by_neuron(twin))) == (False, True)
    assert torch.equal(logits(llama_model), before)
    one = torch.tensor([[7]])
    with torch.no_grad():
        expected = twin(one).logits
        assert torch.equal(countdown.sparsify_(llama_model, profile)(one).logits, expected)


def test_changing_dtype_keeps_thresholds_exact(llama_model, profile):
    countdown.sparsify_(llama_model, profile)
    before = [module.per_term.clone() for module in sparse_modules(llama_model).values()]
    llama_model.half()
    after = [module.per_term for module in sparse_modules(llama_model).values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert llama_model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    out = llama_model.generate(IDS, max_new_tokens=2, pad_token_id=0)
    assert out.shape == (1, 10)


@pytest.mark.parametrize("decision", ["threshold", "topk"])
def test_compiles_in_one_graph_and_the_compiled_code_runs(decision, llama_model, tokenizer, text):
    profile = calibrated(llama_model, tokenizer, text, decision=decision)
    countdown.sparsify_(llama_model, profile, apply_to="all")
    expected = logits(llama_model, use_cache=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(llama_model, backend=counter, fullgraph=True)
    countdown.reset_counters(llama_model)
    torch.testing.assert_close(logits(compiled, use_cache=False), expected)
    assert counter.frame_count == 1
    calls = [node for graph in counter.graphs for node in graph.graph.nodes if "countdown.sparse" in str(node.target)]
    assert len(calls) == 3
    assert [site.tokens for site in countdown.status(llama_model)] == [8, 8, 8]


def test_from_pretrained(model_folder, llama_model, profile, tmp_path):
    profile.save(tmp_path / "p")
    countdown.sparsify_(llama_model, profile, apply_to="all", sparsity=0.3)
    loaded = countdown.from_pretrained(str(model_folder), tmp_path / "p", apply_to="all", sparsity=0.3, device="cpu")
    assert torch.equal(logits(loaded), logits(llama_model))
    with pytest.raises(ConfigError, match="sparsity needs a profile"):
        countdown.from_pretrained(str(model_folder), sparsity=0.5)


def test_status_says_what_runs_where(on_reference, llama_model, profile):
    countdown.sparsify_(llama_model, profile)
    first = countdown.status(llama_model)[0]
    assert (first.name, first.method, first.selector) == ("model.layers.0.mlp", "m-countdown", "up")
    assert (first.decision, first.weighting, first.backend) == ("threshold", "rms", "reference")
    assert (first.tokens, first.realised_sparsity, first.weights_read) == (0, None, None)
    llama_model.generate(IDS, max_new_tokens=5, pad_token_id=0)
    first = countdown.status(llama_model)[0]
    assert first.tokens == 4
    assert first.weights_read == pytest.approx((1 + 2 * (1 - first.realised_sparsity)) / 3)
    countdown.reset_counters(llama_model)
    assert countdown.status(llama_model)[0].tokens == 0


def test_misuse_is_refused(llama_model, profile, monkeypatch):
    with pytest.raises(ConfigError, match="apply_to is 'prefill'"):
        countdown.sparsify_(llama_model, profile, apply_to="prefill")
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        countdown.sparsify_(llama_model.train(), profile)
    llama_model.eval()
    for call in (countdown.restore_, countdown.status):
        with pytest.raises(UnsupportedModelError, match="is not sparsified"):
            call(llama_model)
    monkeypatch.setenv("COUNTDOWN_BACKEND", "triton")
    with pytest.raises(ConfigError, match="COUNTDOWN_BACKEND is 'triton'"):
        countdown.sparsify_(llama_model, profile)
    monkeypatch.delenv("COUNTDOWN_BACKEND")
    countdown.sparsify_(llama_model, profile)
    with pytest.raises(UnsupportedModelError, match="sparsified already"):
        countdown.sparsify_(llama_model, profile)


def test_training_is_refused(llama_model, profile, tokenizer, text):
    countdown.sparsify_(llama_model, profile)
    with pytest.raises(UnsupportedModelError, match="for inference"):
        llama_model(IDS)
    with pytest.raises(UnsupportedModelError, match="for inference"), torch.no_grad():
        llama_model.train()(IDS)
    with pytest.raises(UnsupportedModelError, match="sparsified already"):
        calibrated(llama_model.eval(), tokenizer, text)


def test_a_failed_sparsify_leaves_the_model_as_it_was(llama_model, profile):
    llama_model.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp .*has hooks"):
        countdown.sparsify_(llama_model, profile)
    assert not any(isinstance(module, SparseModule) for module in llama_model.modules())


def test_assisted_decoding_is_refused_under_decode_only(llama_model, profile):
    more = {"max_new_tokens": 4, "pad_token_id": 0, "assistant_model": llama(num_hidden_layers=1), "do_sample": False}
    countdown.sparsify_(llama_model, profile)
    with pytest.raises(UnsupportedModelError, match="assisted decoding does not fit"):
        llama_model.generate(IDS, **more)
    countdown.restore_(llama_model)
    llama_model.generate(IDS, **more)
    countdown.sparsify_(llama_model, profile, apply_to="all")
    assisted = llama_model.generate(IDS, **more)
    plain = llama_model.generate(IDS, max_new_tokens=4, pad_token_id=0, do_sample=False)
    assert torch.equal(assisted, plain)


def test_what_would_compute_generated_tokens_densely_is_refused_under_decode_only(llama_model, profile):
    more = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    batch = {"inputs": [[5, 6, 7], [8, 9]], "max_new_tokens": 4}
    countdown.sparsify_(llama_model, profile)
    for model in (llama_model, copy.deepcopy(llama_model), pickle.loads(pickle.dumps(llama_model))):
        with pytest.raises(UnsupportedModelError, match="use_cache=False does not fit apply_to='decode'"):
            model.generate(IDS, use_cache=False, **more)
        with pytest.raises(UnsupportedModelError, match="generate_batch does not fit apply_to='decode'"):
            model.generate_batch(**batch)
        countdown.reset_counters(model)
        model.generate(IDS, **more)
        assert {site.tokens for site in countdown.status(model)} == {3 * len(IDS)}
    countdown.restore_(llama_model)
    dense = llama_model.generate(IDS, **more)
    assert torch.equal(llama_model.generate(IDS, use_cache=False, **more), dense)
    countdown.sparsify_(llama_model, profile, apply_to="all")
    assert torch.equal(llama_model.generate(IDS, use_cache=False, **more), llama_model.generate(IDS, **more))


def test_only_matching_modules_are_replaced(llama_model, profile):
    object.__setattr__(profile.entries[0], "pattern", "model.layers.1.*")
    countdown.sparsify_(llama_model, profile)
    assert list(sparse_modules(llama_model)) == ["model.layers.1.mlp"]


def test_a_pattern_that_matches_nothing_is_refused(llama_model, profile):
    object.__setattr__(profile.entries[0], "pattern", "model.blocks.*")
    with pytest.raises(
        ProfileError, match=r"'model\.blocks\.\*' takes no module of the model: .* applies to model\.layers\.0\.mlp"
    ):
        countdown.sparsify_(llama_model, profile)


def test_sparsified_under_inference_mode_it_runs_outside_of_it(llama_model, profile):
    with torch.inference_mode():
        countdown.sparsify_(llama_model, profile)
    llama_model.generate(IDS, max_new_tokens=3, pad_token_id=0)
    assert countdown.status(llama_model)[0].tokens == 2


def test_restored_modules_train_with_the_rest(llama_model, profile):
    countdown.sparsify_(llama_model, profile).train()
    countdown.restore_(llama_model)
    assert all(module.training for module in llama_model.modules())


def test_without_the_library_a_cpu_runs_the_reference_and_says_so_once(llama_model, profile, monkeypatch, caplog):
    monkeypatch.setattr(library, "missing", lambda: "its library was not built")
    sparsify.say_once.cache_clear()
    for _ in range(2):
        countdown.sparsify_(llama_model, profile)
        assert not any(by_neuron(llama_model))
        found = {(site.backend, site.backend_reason) for site in countdown.status(llama_model)}
        assert found == {("reference", "its library was not built")}
        countdown.restore_(llama_model)
    assert caplog.text.count("leaves all to the reference, which gains no speed: its library was not built") == 1
    monkeypatch.setenv("COUNTDOWN_BACKEND", "cpu")
    with pytest.raises(ConfigError, match=r"'cpu', which cannot compute .*: its library was not built"):
        countdown.sparsify_(llama_model, profile)


@pytest.fixture
def laid_out(monkeypatch):
    """Weights are stored as kernels want them, whether or not there are some."""
    monkeypatch.setattr(modules.backends, "_refuses", lambda *_: None)


def by_neuron(model):
    return [layer.mlp.down_proj.weight.t().is_contiguous() for layer in model.model.layers]


def test_down_is_stored_by_neuron_and_laid_back(laid_out, llama_model, profile):
    before = {name: value.clone() for name, value in llama_model.state_dict().items()}
    expected = logits(llama_model)
    countdown.sparsify_(llama_model, profile)
    assert all(by_neuron(llama_model))
    for name, value in llama_model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.t().is_contiguous() == ("down_proj" in name) or value.dim() == 1 or 1 in value.shape
    assert {site.backend for site in countdown.status(llama_model)} == {"cpu"}
    copied = copy.deepcopy(llama_model).to(torch.float64)
    assert all(by_neuron(copied))
    countdown.restore_(llama_model)
    assert all(parameter.is_contiguous() for parameter in llama_model.parameters())
    assert torch.equal(logits(llama_model), expected)


def test_assigned_weights_are_laid_out_again(laid_out, llama_model, profile):
    other = {name: value.clone() + 1 for name, value in llama_model.state_dict().items()}
    countdown.sparsify_(llama_model, profile)
    llama_model.load_state_dict(other, assign=True)
    assert all(by_neuron(llama_model))
    assert torch.equal(llama_model.model.layers[1].mlp.down_proj.weight, other["model.layers.1.mlp.down_proj.weight"])


def test_interrupted_halfway_the_model_is_as_it_was(laid_out, llama_model, profile, monkeypatch):
    store, calls = PlainLinear.store, []

    def fails_at_the_third(holder, linear, weight):
        calls.append(linear)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        store(holder, linear, weight)

    monkeypatch.setattr(PlainLinear, "store", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        countdown.sparsify_(llama_model, profile)
    assert all(parameter.is_contiguous() for parameter in llama_model.parameters())
    assert not sparse_modules(llama_model)
    countdown.sparsify_(llama_model, profile)


def test_a_saved_model_is_laid_out_as_always(laid_out, llama_model, profile, tmp_path):
    countdown.sparsify_(llama_model, profile)
    llama_model.save_pretrained(tmp_path / "saved")
    loaded = type(llama_model).from_pretrained(tmp_path / "saved")
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, llama_model.state_dict()[name])


def test_a_profile_may_be_named_by_its_folder(llama_model, profile, tmp_path):
    path = profile.save(tmp_path / "p")
    expected = logits(countdown.sparsify_(llama(), profile, apply_to="all"))
    for named in (path, str(path)):
        assert torch.equal(logits(countdown.sparsify_(llama(), named, apply_to="all")), expected)


@pytest.mark.parametrize("wrong", [None, 3, method("cats")])
def test_what_is_no_profile_is_refused(wrong, llama_model):
    with pytest.raises(ProfileError, match=f"the profile is of type {type(wrong).__name__}, expected what"):
        countdown.sparsify_(llama_model, wrong)


CALLS = {
    "sparsify_": lambda model, profile, tokenizer: countdown.sparsify_(model, profile),
    "restore_": lambda model, profile, tokenizer: countdown.restore_(model),
    "status": lambda model, profile, tokenizer: countdown.status(model),
    "evaluate": lambda model, profile, tokenizer: countdown.evaluate(model, IDS),
    "calibrate": lambda model, profile, tokenizer: countdown.calibrate(model, tokenizer, "a" * 999, method("cats")),
    "choose": lambda model, profile, tokenizer: countdown.choose(model, tokenizer, "a" * 999),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("wrong", [None, "my-model"])
def test_what_is_no_model_is_refused(wrong, call, profile, tokenizer):
    with pytest.raises(UnsupportedModelError, match=f"the model is of type {type(wrong).__name__}, expected a causal"):
        call(wrong, profile, tokenizer)


def offloaded(model):
    accelerate.cpu_offload(model)
    return model


UNFIT = {
    "linear": (lambda model: torch.nn.Linear(3, 3), "Linear is not a causal language model"),
    "compiled": (torch.compile, r"give the model itself \(model._orig_mod\)"),
    "offloaded": (offloaded, "not in memory: they are offloaded"),
}


@pytest.mark.parametrize("make, message", UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("name", ["sparsify_", "calibrate", "choose"])
def test_a_model_that_is_not_itself_is_refused(name, make, message, llama_model, profile, tokenizer):
    with pytest.raises(UnsupportedModelError, match=message):
        CALLS[name](make(llama_model), profile, tokenizer)
