"""Finding the gated FFNs of many architectures by structure, running them sparse, and refusing what is not one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.activations import ACT2CLS, ACT2FN

import countdown
from calls import sparse_module
from countdown.cost import token_bytes
from countdown.errors import UnsupportedModelError
from countdown.methods import method
from countdown.modules import SparseModule
from countdown.phase import Phases
from countdown.sites import check_untouched
from countdown.sites.decoder import decoder_of
from countdown.sites.ffn import find_ffns
from countdown.sites.gated import GatedFFN
from countdown.sites.holders import Rows
from countdown.sites.linear import find_linears
from countdown.sites.recognise import recognise
from countdown.sums.activations import ACTIVATIONS
from tiny import SMALL, llama, spread

LAYERS, H = SMALL["num_hidden_layers"], SMALL["intermediate_size"]
SPLIT = (Rows("gate_proj"), Rows("up_proj"), Rows("down_proj"))
FUSED = (Rows("gate_up_proj", 0, H), Rows("gate_up_proj", H, 2 * H), Rows("down_proj"))
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
HALF_ROTARY = {"rope_parameters": {**ROTARY, "partial_rotary_factor": 0.5}}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1}

# What AutoConfig calls it: the activation, where the roles are, and settings that the small sizes call for.
ARCHITECTURES: dict[str, tuple[str, tuple[Rows, ...], dict[str, Any]]] = {
    "llama": ("silu", SPLIT, {}),
    "mistral": ("silu", SPLIT, {"sliding_window": 4}),
    "ministral": ("silu", SPLIT, {}),
    "qwen2": ("silu", SPLIT, {}),
    "qwen3": ("silu", SPLIT, {}),
    "gemma": ("gelu_tanh", SPLIT, {}),
    "gemma2": ("gelu_tanh", SPLIT, {}),
    "gemma3_text": ("gelu_tanh", SPLIT, {}),
    "phi3": ("silu", FUSED, TOKENS),
    "smollm3": ("silu", SPLIT, {}),
    "granite": ("silu", SPLIT, {}),
    "olmo2": ("silu", SPLIT, {}),
    "olmo3": ("silu", SPLIT, {}),
    "glm4": ("silu", FUSED, HALF_ROTARY),
    "cohere": ("silu", SPLIT, {}),
    "stablelm": ("silu", SPLIT, HALF_ROTARY),
    "seed_oss": ("silu", SPLIT, {}),
    "exaone4": ("silu", SPLIT, {"sliding_window": 4}),
    "helium": ("silu", SPLIT, {}),
    "hunyuan_v1_dense": ("silu", SPLIT, {}),
}


def causal_lm(model_type: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **more})
    return spread(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request) -> tuple[nn.Module, str, tuple[Rows, ...], list[GatedFFN]]:
    """A model with its activation, its roles, and what was found in it; each test puts back what it replaces."""
    activation, roles, settings = ARCHITECTURES[request.param]
    model = causal_lm(request.param, **settings)
    return model, activation, roles, find_ffns(model)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Where others compute too, threads that wait for each other take ten times as long for models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 250, (2, 6), generator=torch.Generator().manual_seed(0))


def sparsified(model: nn.Module, ffns: list[GatedFFN], per_neuron: float, apply_to: str, **settings: Any):
    """Put sparse modules in place and return them with a function that takes them out again."""
    chosen = method("m-countdown", **{"sparsity": 0.5, **settings})
    phases, decoder = Phases(), decoder_of(model)[0]
    modules = [
        sparse_module(ffn, chosen, torch.full((ffn.h,), per_neuron), apply_to=apply_to, phases=phases) for ffn in ffns
    ]
    phases.watch(decoder)
    for ffn, module in zip(ffns, modules, strict=True):
        model.set_submodule(ffn.name, module)

    def undo() -> None:
        phases.leave(decoder)
        for ffn in ffns:
            model.set_submodule(ffn.name, ffn.module)

    return modules, undo


def counted(modules: list[SparseModule]) -> set[int]:
    return {int(module.counters[0]) for module in modules}


def test_every_architecture_is_recognised_with_its_roles(architecture):
    _, activation, roles, ffns = architecture
    assert [ffn.name for ffn in ffns] == [f"model.layers.{i}.mlp" for i in range(LAYERS)]
    for ffn in ffns:
        assert (ffn.gate, ffn.up, ffn.down) == roles
        assert ffn.activation == activation
        assert (ffn.d, ffn.h) == (SMALL["hidden_size"], H)


def test_with_nothing_dropped_logits_are_dense_and_every_token_is_counted(architecture, ids):
    model, _, _, ffns = architecture
    with torch.inference_mode():
        dense = model(ids).logits
        modules, undo = sparsified(model, ffns, -1.0, "all")
        sparse = model(ids).logits
        undo()
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)
    assert counted(modules) == {ids.numel()}


def test_dropping_half_equals_a_model_masked_by_hand(architecture, ids):
    model, _, roles, ffns = architecture
    with torch.inference_mode():
        dense = model(ids).logits
        hooks = [hook for ffn in ffns for hook in masked_by_hand(ffn.module, roles)]
        expected = model(ids).logits
        for hook in hooks:
            hook.remove()
        _, undo = sparsified(model, ffns, 1.0, "all", decision="topk")
        sparse = model(ids).logits
        undo()
    torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-4)
    assert (expected - dense).norm() > 0.01 * dense.norm()


def masked_by_hand(mlp: nn.Module, roles: tuple[Rows, ...]) -> list[Any]:
    """Hook the linears of an FFN so that each token loses the ⌊h/2⌋ neurons with the smallest |u|."""
    seen = {}

    def note(_linear, _inputs, output):
        seen["up"] = output[..., H:] if roles is FUSED else output

    def mask(_linear, inputs):
        order = seen["up"].abs().argsort(dim=-1, stable=True)
        return (inputs[0].scatter(-1, order[..., : H // 2], 0.0),)

    up, down = mlp.get_submodule(roles[1].child), mlp.get_submodule(roles[2].child)
    return [up.register_forward_hook(note), down.register_forward_pre_hook(mask)]


def test_greedy_generation_runs_sparse(architecture, ids):
    model, _, _, ffns = architecture
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    dense = model.generate(ids, **settings)
    modules, undo = sparsified(model, ffns, -1.0, "decode")
    sparse = model.generate(ids, **settings)
    undo()
    assert torch.equal(sparse, dense)
    # The first new token comes from the prompt.
    assert counted(modules) == {2 * 3}


def test_a_model_whose_head_is_called_decoder_is_calibrated_and_evaluated(ids):
    """`get_decoder` of transformers finds a linear of the head there."""
    model = causal_lm("modernbert-decoder", **TOKENS)
    sites = find_ffns(model)
    assert token_bytes(model, sites).other > 0
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    profile = countdown.calibrate(model, None, batch, method("m-countdown", allocation="global"), progress=False)
    found = countdown.evaluate(countdown.sparsify_(model, profile), ids, protocol="decode", progress=False)
    assert found.tokens == 2 * 2
    assert 0 < found.realised_sparsity < 1


# --- activations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ACT2CLS) - {"prelu", "xielu"}))
def test_every_activation_of_the_registry_without_parameters_is_recognised(name):
    found = {ffn.activation for ffn in find_ffns(llama(hidden_act=name, num_hidden_layers=1))}
    assert len(found) == 1
    x = torch.linspace(-20, 20, 999)
    torch.testing.assert_close(ACTIVATIONS[found.pop()](x), ACT2FN[name](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["prelu", "xielu"])
def test_activations_with_parameters_are_refused(name, device):
    with torch.device(device):
        model = llama(hidden_act=name)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp .*has parameters beside its linears.*: act_fn"):
        find_ffns(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_act, activation", [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_activation_is_told_by_value_in_short_dtypes(hidden_act, activation, dtype):
    assert {ffn.activation for ffn in find_ffns(llama(dtype, hidden_act=hidden_act))} == {activation}


def test_meta_device_needs_no_weights():
    with torch.device("meta"):
        skeleton = llama(hidden_act="gelu")
    ffns = find_ffns(skeleton)
    assert [ffn.activation for ffn in ffns] == ["gelu"] * 3
    assert all(parameter.is_meta for parameter in skeleton.parameters())


# --- other forms of the same function --------------------------------------------------------------------------


class Other(nn.Module):
    """An FFN of linears and a function of them."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], **linears: nn.Module) -> None:
        super().__init__()
        self.how = how
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x):
        return self.how(self, x)


def replaced(model: nn.Module, how: Callable[[Any, Tensor], Tensor], layers=range(LAYERS)) -> nn.Module:
    """Put an FFN with another forward into some layers of a Llama, with the linears it had."""
    for i in layers:
        mlp = model.model.layers[i].mlp
        model.model.layers[i].mlp = Other(how, gate=mlp.gate_proj, up=mlp.up_proj, down=mlp.down_proj)
    return model


def linear(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    made = nn.Linear(columns, rows, bias=bias)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=columns**-0.5)
    return made


def test_names_play_no_part(llama_model):
    for layer in llama_model.model.layers:
        linears = {"w3": layer.mlp.up_proj, "w1": layer.mlp.gate_proj, "w2": layer.mlp.down_proj}
        layer.mlp = Other(lambda m, x: m.w2(F.silu(m.w1(x)) * m.w3(x)), **linears)
    assert {(ffn.gate, ffn.up, ffn.down) for ffn in find_ffns(llama_model)} == {(Rows("w1"), Rows("w3"), Rows("w2"))}


def test_square_ffn_is_told_by_value():
    assert {(ffn.gate, ffn.up, ffn.down) for ffn in find_ffns(llama(intermediate_size=24))} == {SPLIT}


FUSED_FORMS = {
    "gate first": (lambda v: (v[..., :H], v[..., H:]), Rows("both", 0, H), Rows("both", H, 2 * H)),
    "up first": (lambda v: (v[..., H:], v[..., :H]), Rows("both", H, 2 * H), Rows("both", 0, H)),
    "gate in even rows": (lambda v: (v[..., ::2], v[..., 1::2]), Rows("both", 0, None, 2), Rows("both", 1, None, 2)),
    "gate in odd rows": (lambda v: (v[..., 1::2], v[..., ::2]), Rows("both", 1, None, 2), Rows("both", 0, None, 2)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("form", FUSED_FORMS)
def test_gate_and_up_fused_in_one_linear(form, bias, llama_model, ids):
    halves, gate, up = FUSED_FORMS[form]

    def forward(module, x):
        g, u = halves(module.both(x))
        return module.down(F.gelu(g) * u)

    torch.manual_seed(0)
    for layer in llama_model.model.layers:
        layer.mlp = Other(forward, both=linear(2 * H, 24, bias), down=linear(24, H, bias))
    ffns = find_ffns(llama_model)
    assert {(ffn.gate, ffn.up, ffn.down, ffn.activation) for ffn in ffns} == {(gate, up, Rows("down"), "gelu")}
    with torch.inference_mode():
        dense = llama_model(ids).logits
        sparsified(llama_model, ffns, -1.0, "all")
        torch.testing.assert_close(llama_model(ids).logits, dense, rtol=1e-5, atol=1e-5)


def test_biases_are_part_of_the_formula(ids):
    model = spread(llama(mlp_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    ffns = find_ffns(model)
    with torch.inference_mode():
        dense = model(ids).logits
        sparsified(model, ffns, -1.0, "all")
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activations_that_differ_by_layer_are_told_for_each(device):
    with torch.device(device):
        model = llama()
    replaced(model, lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), layers=[0, 2])
    replaced(model, lambda m, x: m.down(F.relu(m.gate(x)) * m.up(x)), layers=[1])
    assert [ffn.activation for ffn in find_ffns(model)] == ["silu", "relu", "silu"]


# --- refusals --------------------------------------------------------------------------------------------------


def silu(module, x):
    return F.silu(module.gate(x))


FORMULA = r"does not compute down\(act\(gate\(x\)\) \* up\(x\)\) with act one of silu, "
MORE = {
    "clamp": (lambda m, x: m.down(silu(m, x) * m.up(x).clamp(-400, 400)), "follows the formula on small inputs only"),
    "soft cap": (lambda m, x: m.down(silu(m, x) * (m.up(x) / 1e5).tanh() * 1e5), "follows the formula on small inputs"),
    "multiplier": (lambda m, x: m.down(silu(m, x) * m.up(x)) * 1.1, r"multiplies its result by 1\.1 \(silu\)"),
    "residual": (lambda m, x: x + m.down(silu(m, x) * m.up(x)), FORMULA),
    "unknown activation": (lambda m, x: m.down(F.selu(m.gate(x)) * m.up(x)), FORMULA),
    "inner norm": (lambda m, x: m.down(F.layer_norm(silu(m, x) * m.up(x), (H,))), FORMULA),
    "dropout": (lambda m, x: m.down(F.dropout(silu(m, x) * m.up(x), 0.1)), "gives another result each time in eval"),
}


@pytest.mark.parametrize("form", MORE)
def test_an_ffn_that_does_more_than_the_formula_is_refused(form, llama_model):
    how, reason = MORE[form]
    replaced(llama_model, how, layers=[1])
    with pytest.raises(UnsupportedModelError, match=rf"^LlamaForCausalLM is.*model\.layers\.1\.mlp \(Other\) {reason}"):
        find_ffns(llama_model)


def test_inner_norm_with_weights_is_refused_by_its_name():
    with pytest.raises(UnsupportedModelError, match=r"BitNetMLP\) has parameters beside .*: ffn_sub_norm \(BitNetRMS"):
        find_ffns(causal_lm("bitnet"))


UNGATED = {
    "gpt2": r"layer transformer\.h\.0 \(GPT2Block\) has an FFN without a gate: mlp\.c_fc and mlp\.c_proj",
    "bert": r"\(BertLayer\) has an FFN without a gate: intermediate\.dense and output\.dense",
    "falcon": r"\(FalconDecoderLayer\) has an FFN without a gate: mlp\.dense_h_to_4h and mlp\.dense_4h_to_h",
    "opt": r"\(OPTDecoderLayer\) has an FFN without a gate: fc1 and fc2",
    "nemotron": r"\(NemotronDecoderLayer\) has an FFN without a gate: mlp\.up_proj and mlp\.down_proj",
}


@pytest.mark.parametrize("model_type", UNGATED)
def test_ungated_models_are_refused_with_what_they_have(model_type):
    config = AutoConfig.for_model(model_type, hidden_size=24, num_attention_heads=2, vocab_size=50, is_decoder=True)
    config.update({"num_hidden_layers": 1, config.attribute_map.get("intermediate_size", "intermediate_size"): 96})
    if model_type == "nemotron":
        config.num_key_value_heads = 2
    config.pad_token_id = 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=UNGATED[model_type]):
        find_ffns(model)


def test_a_model_without_ffns_is_refused_with_the_parts_it_has():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", num_hidden_layers=1, hidden_size=24))
    with pytest.raises(UnsupportedModelError, match=r"has no gated FFN .* Its parts are norm: .*mixer: MambaMixer"):
        find_ffns(model)


def test_mixture_of_experts_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM has a mixture of experts"):
        find_ffns(causal_lm("mixtral", num_local_experts=2))


GRANITE_HYBRID = {
    "layers_block_type": ["full_attention"] * LAYERS,
    "shared_intermediate_size": H,
    "mamba_n_heads": 2,
    "mamba_d_head": 24,
}


def test_experts_beside_a_dense_ffn_are_refused():
    model = causal_lm("granitemoehybrid", **GRANITE_HYBRID, num_local_experts=2)
    assert recognise("", model.model.layers[0].shared_mlp, []) is not None
    with pytest.raises(UnsupportedModelError, match="block_sparse_moe, GraniteMoeHybridMoE"):
        find_ffns(model)


def test_experts_in_some_layers_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"mixture of experts \(model\.layers\.1\.mlp, DeepseekV3MoE\)"):
        find_ffns(causal_lm("deepseek_v3", first_k_dense_replace=1, n_routed_experts=4, n_group=1, topk_group=1))


def test_a_dense_model_of_a_family_of_experts_is_accepted():
    """Its classes say MoE and have no experts."""
    ffns = find_ffns(causal_lm("granitemoehybrid", **GRANITE_HYBRID, num_local_experts=0))
    assert [ffn.name for ffn in ffns] == [f"model.layers.{i}.shared_mlp" for i in range(LAYERS)]
    assert {(ffn.gate, ffn.up) for ffn in ffns} == {(Rows("input_linear", 0, H), Rows("input_linear", H, 2 * H))}


class Adapter(nn.Linear):
    """As PEFT and quantisation replace linears: it says its sizes and computes something else."""


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_other_linears_are_refused_by_name(name, llama_model):
    mlp = llama_model.model.layers[2].mlp
    old = mlp.get_submodule(name)
    mlp.set_submodule(name, Adapter(old.in_features, old.out_features, bias=False))
    with pytest.raises(UnsupportedModelError, match=rf"layers\.2\.mlp\.{name} is a .*\.Adapter, expected a plain"):
        find_ffns(llama_model)


def test_other_linears_in_attention_are_left_alone(llama_model):
    for layer in llama_model.model.layers:
        layer.self_attn.q_proj = Adapter(24, 24, bias=False)
    assert len(find_ffns(llama_model)) == 3


@pytest.mark.parametrize("part", ["", "gate_proj", "down_proj"])
def test_hooks_that_would_be_bypassed_are_refused(part, llama_model):
    llama_model.model.layers[0].mlp.get_submodule(part).register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="has hooks or a replaced forward"):
        check_untouched(find_ffns(llama_model)[0])


def test_what_is_no_language_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear is not a causal language model"):
        find_ffns(nn.Linear(3, 3))


# --- where the decoder is --------------------------------------------------------------------------------------


def vision_language_model() -> nn.Module:
    """A Qwen2.5-VL, whose vision tower has gated FFNs too."""
    text = {**SMALL, "num_key_value_heads": 2, "rope_parameters": {**ROTARY, "mrope_section": [2, 2, 2]}}
    vision = {"depth": 2, "hidden_size": 24, "out_hidden_size": 24, "num_heads": 2, "intermediate_size": 53}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return spread(AutoModelForImageTextToText.from_config(config).eval())


def test_a_vision_tower_with_gated_ffns_is_left_alone(ids):
    model = vision_language_model()
    tower = model.model.visual
    before = dict(tower.named_modules())
    assert recognise("", tower.blocks[0].mlp, []) is not None
    ffns = find_ffns(model)
    assert [ffn.name for ffn in ffns] == [f"model.language_model.layers.{i}.mlp" for i in range(LAYERS)]
    with torch.inference_mode():
        dense = model(ids).logits
        modules, _ = sparsified(model, ffns, -1.0, "all")
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-5, atol=1e-5)
    assert counted(modules) == {ids.numel()}
    assert dict(tower.named_modules()) == before


def test_a_head_called_decoder_is_not_taken_for_the_decoder():
    model = causal_lm("modernbert-decoder", **TOKENS)
    assert isinstance(model.get_decoder(), nn.Linear)
    assert [ffn.name for ffn in find_ffns(model)] == [f"model.layers.{i}.mlp" for i in range(LAYERS)]


class Wrapper(nn.Module):
    """Parts by name, of which `decoder` is said to be the text decoder."""

    def __init__(self, decoder: str, **parts: nn.Module) -> None:
        super().__init__()
        self.decoder_name = decoder
        for name, part in parts.items():
            self.add_module(name, part)

    def get_decoder(self):
        return self.get_submodule(self.decoder_name)

    def get_input_embeddings(self):
        return self.text.get_input_embeddings()


def test_only_the_named_decoder_is_searched(llama_model):
    model = Wrapper("text", vision_tower=llama(), text=llama_model)
    assert [ffn.name for ffn in find_ffns(model)] == [f"text.model.layers.{i}.mlp" for i in range(3)]


def test_a_tower_inside_the_decoder_is_left_alone(llama_model):
    llama_model.model.embed_images = Wrapper("", tower=llama())
    assert [ffn.name for ffn in find_ffns(llama_model)] == [f"model.layers.{i}.mlp" for i in range(3)]


def test_several_possible_decoders_are_refused(llama_model):
    model = Wrapper("", text=Wrapper("", inner=llama_model), speech=llama())
    model.text.get_input_embeddings = llama_model.get_input_embeddings
    with pytest.raises(UnsupportedModelError, match=r"does not tell which of .*speech\.model\.layers is its text dec"):
        find_ffns(model)


def test_linears_of_attention_and_ffn_are_found_in_order(llama_model):
    names = [site.name for site in find_linears(llama_model)]
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    expected = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == [f"model.layers.{i}.{part}" for i in range(3) for part in expected]
