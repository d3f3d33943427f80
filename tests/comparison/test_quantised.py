"""Quantised copies of a dense model: what they compute, what they share, what they read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from countdown.comparison.quantised import GROUP, quantise, schemes, settings
from countdown.decoding import DecodeLoop
from countdown.errors import UnsupportedModelError
from countdown.sites.linear import find_linears
from tiny import llama

CPU = torch.device("cpu")
# Rows of whole groups, as int4 needs.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["float32", "bfloat16"])
def model(request) -> nn.Module:
    return llama(getattr(torch, request.param), **SIZES, attention_bias=True)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


@torch.no_grad()
@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.02), ("int4", 0.25)])
def test_each_linear_computes_nearly_what_the_dense_one_does(model, scheme, most):
    made = quantise(model, scheme)
    for site in find_linears(model):
        x = torch.randn(2, 3, site.module.in_features).to(model.dtype)
        found = made.model.get_submodule(site.name)(x)
        assert found.dtype == model.dtype
        assert 0 < error(found, site.module(x)) < most


@torch.no_grad()
def test_the_dense_model_is_left_alone(model):
    before = model(IDS).logits
    names = [name for name, _ in model.named_parameters()]
    made = quantise(model, "int8")
    assert torch.equal(model(IDS).logits, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert not torch.equal(made.model(IDS).logits, before)
    # What is not quantised is shared, not copied.
    assert made.model.lm_head.weight is model.lm_head.weight
    assert made.model.model.embed_tokens.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_what_is_saved_counts_scales(scheme, bits):
    model = llama(torch.bfloat16, **SIZES)
    made = quantise(model, scheme)
    for site in find_linears(model):
        weight = site.module.weight
        out, row = weight.shape
        # A bfloat16 scale a row; or a scale and a zero point for each group.
        scales = 2 * out if scheme == "int8" else 4 * out * row // GROUP
        assert made.saved[site.name] == weight.nbytes - weight.numel() * bits // 8 - scales


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_it_runs_in_the_decode_loop(scheme):
    model = llama(torch.float32, **SIZES)
    made = quantise(model, scheme).model
    loop = DecodeLoop(made, IDS, new_tokens=12)
    plain = made.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(loop.run(12), plain[0, IDS.shape[1] :])


def test_a_weight_of_another_class_computes_in_its_own_way():
    # As on GPUs, where torchao's tensors stay in their linears.
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama(torch.float32, **SIZES)
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    loop = DecodeLoop(model, IDS, new_tokens=8)
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(loop.run(8), plain[0, IDS.shape[1] :])


def test_rows_that_no_group_divides_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"multiple of 32 weights, and the model's linears have \[24, 53\]"):
        quantise(llama(), "int4")


def test_settings_name_the_kernel():
    assert schemes(CPU) == ["int8", "int4"]
    assert settings("int4", CPU)["kernel"] == "aten::_weight_int4pack_mm_for_cpu"
    assert settings("int8", CPU)["quantised"] == "int8"
