"""Finding gated FFNs by structure, and refusing what is not one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from conftest import SMALL, llama, spread
from countdown.errors import UnsupportedModelError
from countdown.models.ffn import check_untouched, find_ffns


def test_every_layer_is_found_in_order(model):
    ffns = find_ffns(model)
    assert [ffn.name for ffn in ffns] == [f"model.layers.{i}.mlp" for i in range(3)]
    for ffn in ffns:
        assert (ffn.gate_name, ffn.up_name, ffn.down_name) == ("gate_proj", "up_proj", "down_proj")
        assert (ffn.d, ffn.h) == (24, 53)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "hidden_act, activation",
    [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), ("relu", "relu")],
)
def test_activation_is_told_by_value(hidden_act, activation, dtype):
    assert {ffn.activation for ffn in find_ffns(llama(dtype, hidden_act=hidden_act))} == {activation}


class _OtherNames(nn.Module):
    """The same structure under names that say nothing, gate and up in the other order."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.w3, self.w1, self.w2 = mlp.up_proj, mlp.gate_proj, mlp.down_proj

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def test_names_play_no_part(llama_model):
    for layer in llama_model.model.layers:
        layer.mlp = _OtherNames(layer.mlp)
    ffns = find_ffns(llama_model)
    assert {(ffn.gate_name, ffn.up_name, ffn.down_name) for ffn in ffns} == {("w1", "w3", "w2")}


def test_square_ffn_is_told_by_value():
    ffns = find_ffns(llama(intermediate_size=24))
    assert {(ffn.gate_name, ffn.up_name, ffn.down_name) for ffn in ffns} == {("gate_proj", "up_proj", "down_proj")}


def test_meta_device_needs_no_weights():
    with torch.device("meta"):
        skeleton = llama(hidden_act="gelu")
    ffns = find_ffns(skeleton)
    assert [ffn.activation for ffn in ffns] == ["gelu"] * 3
    assert all(parameter.is_meta for parameter in skeleton.parameters())


class _Altered(nn.Module):
    def __init__(self, mlp: nn.Module, how) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.how = mlp.gate_proj, mlp.up_proj, mlp.down_proj, how

    def forward(self, x):
        return self.how(self, x)


def _silu(mlp, x):
    return nn.functional.silu(mlp.gate_proj(x))


ALTERED = {
    "clamp": lambda m, x: m.down_proj(_silu(m, x) * m.up_proj(x).clamp(-400, 400)),
    "multiplier": lambda m, x: m.down_proj(_silu(m, x) * m.up_proj(x)) * 1.1,
    "residual": lambda m, x: x + m.down_proj(_silu(m, x) * m.up_proj(x)),
    "unknown activation": lambda m, x: m.down_proj(m.gate_proj(x).tanh() * m.up_proj(x)),
    "quick gelu": lambda m, x: m.down_proj(m.gate_proj(x) * (1.702 * m.gate_proj(x)).sigmoid() * m.up_proj(x)),
    "inner norm": lambda m, x: m.down_proj(nn.functional.layer_norm(_silu(m, x) * m.up_proj(x), (53,))),
}


@pytest.mark.parametrize("how", ALTERED.values(), ids=ALTERED)
def test_an_ffn_that_does_more_than_the_formula_is_refused(how, llama_model):
    layer = llama_model.model.layers[1]
    layer.mlp = _Altered(layer.mlp, how)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp \(_Altered\) does not compute"):
        find_ffns(llama_model)


def test_ungated_model_is_refused_with_its_class_name():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel is not supported.*mlp: GPT2MLP"):
        find_ffns(model)


def test_fused_gate_up_is_refused_with_its_class_name():
    sizes = {**SMALL, "pad_token_id": 0, "eos_token_id": 0}
    with pytest.raises(UnsupportedModelError, match=r"Phi3ForCausalLM is not supported.*mlp: Phi3MLP"):
        find_ffns(Phi3ForCausalLM(Phi3Config(**sizes)))


def test_mixture_of_experts_is_refused():
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM has a mixture of experts"):
        find_ffns(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)))


class _Adapter(nn.Linear):
    pass


def test_other_linears_are_refused_by_name(llama_model):
    llama_model.model.layers[2].mlp.up_proj = _Adapter(24, 53, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.up_proj is a .*_Adapter"):
        find_ffns(llama_model)


@pytest.mark.parametrize("part", ["", "gate_proj", "down_proj"])
def test_hooks_that_would_be_bypassed_are_refused(part, llama_model):
    mlp = llama_model.model.layers[0].mlp
    mlp.get_submodule(part).register_forward_hook(lambda *_: None)
    ffn = find_ffns(llama_model)[0]
    with pytest.raises(UnsupportedModelError, match="has hooks or a replaced forward"):
        check_untouched(ffn)


def test_vision_towers_are_left_alone(llama_model):
    class WithTower(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower = llama()
            self.text = llama_model

        def get_decoder(self):
            return self.text.model

    assert [ffn.name for ffn in find_ffns(WithTower())] == [f"text.model.layers.{i}.mlp" for i in range(3)]


def test_biases_are_part_of_the_formula():
    model = spread(llama(mlp_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    assert len(find_ffns(model)) == 3
