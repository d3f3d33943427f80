"""Active sets against the exact ones."""

from __future__ import annotations

import pytest
import torch

import countdown
import oracle
from countdown.errors import UnsupportedModelError
from countdown.evaluation.diagnostics import diagnose
from countdown.methods import method
from countdown.modules import sparse_modules
from countdown.sites.ffn import find_ffns
from tiny import llama

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def sparsified(model, tokenizer, text, config):
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)
    return countdown.sparsify_(model, profile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_exact_coefficient_finds_itself(dtype, tokenizer, text):
    model = sparsified(llama(dtype), tokenizer, text, method("d-countdown", sparsity=0.6))
    found = diagnose(model, IDS)
    assert [one.name for one in found] == [ffn.name for ffn in find_ffns(countdown.restore_(model))]
    assert all((one.recall, one.precision) == (1.0, 1.0) for one in found)
    assert all(0 < one.lost < 0.2 for one in found)


def test_it_counts_what_the_definitions_say(llama_model, tokenizer, text):
    model = sparsified(llama_model, tokenizer, text, method("m-countdown", sparsity=0.6))
    name, module = next(iter(sparse_modules(model).items()))
    inputs = []
    hook = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
    (found, *_) = diagnose(model, IDS)
    hook.remove()
    sum_ = module.site.sum
    weights, biases = [weight.values() for weight in sum_.weights], sum_.biases
    both = exact = active = 0
    for x in inputs:
        a, u = oracle.projections(x, [w.detach() for w in weights], biases, sum_.activation)
        for token in range(len(x)):
            wanted = oracle.topk_active((a * u)[token].abs().tolist(), int(0.6 * 53))
            chosen = (u[token].abs() > module.per_term).tolist()
            both += sum(w and c for w, c in zip(wanted, chosen, strict=True))
            exact, active = exact + sum(wanted), active + sum(chosen)
    assert found.name == name
    assert found.recall == pytest.approx(both / exact)
    assert found.precision == pytest.approx(both / active)


def test_more_bits_find_more(llama_model, tokenizer, text):
    recalls = []
    for bits in (3, 4):
        model = sparsified(llama_model, tokenizer, text, method("d-proxy", sparsity=0.6, bits=bits, decision="topk"))
        found = diagnose(model, IDS)
        assert all(one.recall == pytest.approx(one.precision) for one in found)
        recalls.append(sum(one.recall for one in found) / len(found))
        countdown.restore_(model)
    assert 0.6 < recalls[0] < recalls[1] < 1


def test_without_sparse_modules_there_is_nothing_to_compare(llama_model):
    with pytest.raises(UnsupportedModelError, match="the model is not sparsified"):
        diagnose(llama_model, IDS)
