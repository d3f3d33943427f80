"""What torch keeps for a whole process or thread changes no number of ours: defaults, autocast, modes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import countdown
from countdown.evaluation.diagnostics import diagnose
from countdown.evaluation.generation import encode_prompt, generate
from countdown.loading import Source, load_skeleton
from countdown.methods import Method, method
from countdown.modules import SparseModule
from countdown.profiles.profile import Profile
from countdown.sites.ffn import find_ffns
from countdown.text import windows
from tiny import llama

PACKAGE = Path(countdown.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
METHODS = [
    method("m-countdown", weighting="rms", allocation="global"),
    method("d-proxy"),
    method("teal"),
]


def incomplete(file: Path) -> list[str]:
    """The calls in a file that make a tensor of what dtype or on what device is the default."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in FACTORIES]
    return [
        f"{file.name}:{call.lineno}"
        for call in made
        if ast.unparse(call.func).startswith("torch.") and not {"dtype", "device"} <= {k.arg for k in call.keywords}
    ]


def test_every_tensor_is_made_with_its_dtype_and_device():
    assert [found for file in sorted(PACKAGE.rglob("*.py")) for found in incomplete(file)] == []


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    # Where nothing can be read from: a tensor made there by mistake is found out at once.
    "default device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
}
# Those in which transformers, too, computes what it does elsewhere.
COMPUTING = {name: state for name, state in STATES.items() if name not in ("default device meta", "autocast")}


def calibrated(config: Method, model: nn.Module, tokenizer: Any, text: str) -> Profile:
    return countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)


@pytest.fixture(scope="module", params=METHODS, ids=lambda config: config.name)
def plain(request, tokenizer, text) -> Profile:
    """A profile as it is made where nobody changed anything."""
    return calibrated(request.param, llama(), tokenizer, text)


def artifacts(profile: Profile) -> dict[tuple[str, str], Tensor]:
    return {(site, name): t for e in profile.entries for site, found in e.sites.items() for name, t in found.items()}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_calibration_finds_the_same_bits(state, plain, tokenizer, text):
    model = llama()
    with state():
        found = calibrated(plain.entries[0].method, model, tokenizer, text)
    assert artifacts(found).keys() == artifacts(plain).keys()
    for name, tensor in artifacts(plain).items():
        assert artifacts(found)[name].dtype == tensor.dtype
        assert torch.equal(artifacts(found)[name], tensor), name
    assert found.samples.keys() == plain.samples.keys()
    assert all(torch.equal(found.samples[name], sample) for name, sample in plain.samples.items())


def outcome(model: nn.Module, profile: Profile, tokenizer: Any, text: str) -> tuple[Any, ...]:
    """What a sparse model writes and costs."""
    countdown.sparsify_(model, profile)
    written = generate(model, tokenizer, encode_prompt(tokenizer, "one", raw=True), max_new_tokens=4).tokens
    ids = windows(tokenizer, text, count=1, length=64)
    return written, countdown.evaluate(model, ids, progress=False), diagnose(model, ids)


@pytest.fixture(scope="module")
def usual(plain, tokenizer, text) -> tuple[Any, ...]:
    return outcome(llama(), plain, tokenizer, text)


@pytest.mark.parametrize("state", COMPUTING.values(), ids=COMPUTING)
def test_a_sparse_model_writes_and_costs_the_same(state, plain, usual, tokenizer, text):
    model = llama()
    with state():
        assert outcome(model, plain, tokenizer, text) == usual


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_thresholds_are_float32_on_the_models_device(state, plain):
    model = llama()
    with state():
        countdown.sparsify_(model, plain)
    modules = [module for module in model.modules() if isinstance(module, SparseModule)]
    assert {(module.per_term.dtype, module.per_term.device.type) for module in modules} == {(torch.float32, "cpu")}
    assert not any(module.per_term.is_inference() for module in modules)


# --- autocast --------------------------------------------------------------------------------------------------


def autocast(dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("config", METHODS[1:], ids=lambda config: config.name)
def test_under_autocast_a_sparse_model_that_drops_nothing_is_the_dense_one(
    backend, config, monkeypatch, tokenizer, text
):
    if backend == "reference":
        monkeypatch.setenv("COUNTDOWN_BACKEND", backend)
    model, ids = llama(), windows(tokenizer, text, count=1, length=32)
    profile = calibrated(config, model, tokenizer, text)
    with torch.inference_mode(), autocast():
        dense = model(ids).logits
        countdown.sparsify_(model, profile, apply_to="all", sparsity=0.0)
        sparse = model(ids).logits
    assert sparse.dtype == dense.dtype
    assert (sparse - dense).float().norm() < 0.02 * dense.float().norm()
    assert {site.tokens for site in countdown.status(model)} == {32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_under_autocast_a_sparse_module_gives_what_the_dense_one_would_in_dtype(dtype, tokenizer, text):
    model = llama()
    countdown.sparsify_(model, calibrated(METHODS[0], model, tokenizer, text), apply_to="all")
    module = model.get_submodule("model.layers.0.mlp")
    if dtype == torch.float64:
        module.double()
    x = torch.randn(1, 1, 24, dtype=dtype)
    with torch.inference_mode(), autocast():
        assert module(x).dtype == module.dense(x).dtype


def test_under_autocast_an_answer_is_that_of_transformers(tokenizer, text):
    model = llama()
    countdown.sparsify_(model, calibrated(METHODS[1], model, tokenizer, text))
    prompt = encode_prompt(tokenizer, "one", raw=True)
    with autocast():
        found = generate(model, tokenizer, prompt, max_new_tokens=6)
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert found.by == "transformers"
    assert found.tokens == expected[0, prompt.shape[1] :].tolist()


def test_under_autocast_ffns_are_recognised():
    with autocast():
        found = find_ffns(llama(hidden_act="gelu_pytorch_tanh"))
    assert {ffn.activation for ffn in found} == {"gelu_tanh"}


@pytest.mark.parametrize("state", ["default dtype bfloat16", "default device meta"])
def test_what_a_token_reads_is_counted_the_same(state, model_folder):
    source = Source.parse(str(model_folder))
    expected = [site.nbytes for site in find_ffns(load_skeleton(source))]
    with STATES[state]():
        assert [site.nbytes for site in find_ffns(load_skeleton(source))] == expected
