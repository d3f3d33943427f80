"""What docs/service.md says of a model in a program that serves it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import countdown
from countdown.evaluation.generation import generate
from countdown.methods import method
from countdown.modules import SparseModule, sparse_modules
from countdown.ops import reference
from countdown.ops.base import MOST_TOKENS
from countdown.ops.cpu import library as cpu_library
from countdown.ops.cpu.backend import CPU
from countdown.sparsify import sparse_twin
from tiny import llama

PROMPTS = [torch.arange(3, 6 + 2 * length)[None] for length in range(4)]
needs_kernels = pytest.mark.skipif(cpu_library.missing() is not None, reason="without a compiler there are no kernels")


@pytest.fixture
def profile(llama_model, tokenizer, text):
    return countdown.calibrate(llama_model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)


@pytest.fixture
def sparse(llama_model, profile) -> nn.Module:
    return countdown.sparsify_(llama_model, profile)


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads that take turns a thousand times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=["kernels", "reference"])
def backend(request, monkeypatch) -> str:
    if request.param == "reference":
        monkeypatch.setenv("COUNTDOWN_BACKEND", "reference")
    return request.param


def by_transformers(model: nn.Module, ids: Tensor, new_tokens: int = 8) -> list[int]:
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return found[:, ids.shape[1] :].tolist()


def counts(model: nn.Module) -> list[list[int]]:
    return [module.counters.tolist() for module in sparse_modules(model).values()]


@pytest.mark.usefixtures("hurried", "backend")
def test_threads_get_the_text_they_would_get_alone_and_every_token_counts(sparse):
    alone = [by_transformers(sparse, ids) for ids in PROMPTS]
    expected = counts(sparse)
    countdown.reset_counters(sparse)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda ids: by_transformers(sparse, ids), PROMPTS)) == alone
    assert counts(sparse) == expected


@pytest.mark.usefixtures("hurried", "backend")
def test_no_count_is_lost_between_threads(sparse):
    module = next(iter(sparse_modules(sparse).values()))
    x = torch.randn(1, 24, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def compute(_: int) -> None:
        for _ in range(500):
            module.sparse(x)

    compute(0)
    (tokens, active), *_ = counts(sparse)
    countdown.reset_counters(sparse)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(compute, range(4)))
    assert counts(sparse)[0] == [4 * tokens, 4 * active]


@pytest.mark.usefixtures("hurried")
def test_answers_of_our_own_generate_take_turns(sparse, tokenizer):
    def answer(ids: Tensor) -> list[int]:
        return generate(sparse, tokenizer, ids, max_new_tokens=6).tokens

    alone = [answer(ids) for ids in PROMPTS]
    expected = counts(sparse)
    countdown.reset_counters(sparse)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(answer, PROMPTS)) == alone
    assert counts(sparse) == expected


def test_an_answer_may_ask_for_another(sparse, tokenizer):
    inner: list[Any] = []

    def write(_: str) -> None:
        if not inner:
            inner.append(generate(sparse, tokenizer, PROMPTS[1], max_new_tokens=3).tokens)

    generate(sparse, tokenizer, PROMPTS[0], max_new_tokens=3, write=write)
    assert inner == [generate(sparse, tokenizer, PROMPTS[1], max_new_tokens=3).tokens]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_run_on_as_many_threads_as_torch(threads, sparse, monkeypatch):
    module = next(iter(sparse_modules(sparse).values()))
    monkeypatch.setattr(cpu_library, "_GRAIN", 1)  # however small
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.inference_mode(), cpu_library.library().watched() as seen:
        module.sparse(torch.randn(1, 24))
    assert [ran.parts for ran in seen] == [threads]


def stored(model: nn.Module) -> dict[str, tuple[int, torch.dtype]]:
    return {name: (parameter.nbytes, parameter.dtype) for name, parameter in model.named_parameters()}


def test_sparsifying_adds_no_weights_but_the_proxies_it_names(tokenizer, text):
    for name, has_proxy in (("m-countdown", False), ("d-proxy", True)):
        model = llama()
        before = stored(model)
        made = countdown.calibrate(model, tokenizer, text, method(name), tokens=512, progress=False)
        countdown.sparsify_(model, made)
        assert stored(model) == before
        held = [part for module in sparse_modules(model).values() for weight in module.parts for part in weight.parts]
        beside = sum(site.beside_bytes for site in countdown.status(model))
        assert beside == sum(part.nbytes for part in held)
        assert (beside > 0) == has_proxy


def test_a_twin_shares_all_weights_but_down(llama_model, profile):
    twin = sparse_twin(llama_model, profile)
    places = {name: parameter.data_ptr() for name, parameter in llama_model.named_parameters()}
    apart = {name for name, parameter in twin.named_parameters() if parameter.data_ptr() != places[name]}
    assert apart == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)}
    assert sparse_modules(twin)
    assert not sparse_modules(llama_model)


@needs_kernels
def test_more_than_eight_tokens_of_a_call_are_the_references(sparse, monkeypatch):
    taken: list[int] = []
    plain = reference.run
    monkeypatch.setattr(reference, "run", lambda call: taken.append(call.tokens) or plain(call))
    assert MOST_TOKENS == 8
    for sequences in (1, 8, 9):
        by_transformers(sparse, torch.arange(3, 6).expand(sequences, 3), new_tokens=2)
    assert taken == [9] * len(sparse_modules(sparse))


@needs_kernels
def test_after_the_first_answer_no_call_is_described_anew(sparse, monkeypatch):
    described: list[Any] = []
    run = CPU.run
    monkeypatch.setattr(CPU, "run", lambda backend, call: described.append(call) or run(backend, call))
    for sequences in (1, 3):
        prompt = torch.arange(3, 6).expand(sequences, 3)
        by_transformers(sparse, prompt)
        described.clear()
        by_transformers(sparse, prompt)
        assert not described


def test_in_normal_use_nothing_is_logged_printed_or_warned(tokenizer, text, caplog, capfd):
    caplog.set_level(logging.DEBUG, "countdown")
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = countdown.calibrate(model, tokenizer, text, method("d-proxy"), tokens=512, progress=False)
        countdown.sparsify_(model, made)
        by_transformers(model, PROMPTS[0])
        countdown.evaluate(model, PROMPTS[3], progress=False)
        countdown.restore_(model)
    assert [record for record in caplog.records if record.name.startswith("countdown")] == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("countdown").handlers == []


def test_what_kernels_leave_to_the_reference_is_a_warning_of_our_logger(llama_model, profile, caplog, monkeypatch):
    # Messages are said once in a process.
    monkeypatch.setattr("countdown.sparsify.library.missing", lambda: "there is no compiler, says this test")
    for _ in range(2):
        countdown.restore_(countdown.sparsify_(llama_model, profile))
    said = [record for record in caplog.records if "says this test" in record.getMessage()]
    assert [(record.name, record.levelname) for record in said] == [("countdown", "WARNING")]


@pytest.mark.usefixtures("on_reference")
def test_a_neuron_that_flips_moves_the_output_by_its_whole_term(sparse):
    """However little its indicator moves: docs/methods.md."""
    module: SparseModule = next(iter(sparse_modules(sparse).values()))
    x = torch.randn(1, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        gate, up = module.site.sum.project(x)
        neuron = int(up.abs().argmax())
        at = up[0, neuron].abs()
        outputs = []
        for tau in (at, at.nextafter(torch.tensor(0.0))):
            module.per_term[neuron] = tau
            outputs.append(module.sparse(x)[0])
        term = gate[0, neuron] * up[0, neuron] * module.site.weights[-1].values()[:, neuron]
    torch.testing.assert_close(outputs[1] - outputs[0], term)
    assert term.norm() > 1e-3
