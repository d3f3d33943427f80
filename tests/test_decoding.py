"""The decode loop on a CPU."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import countdown
from calls import made_sparse
from countdown import decoding, one_token
from countdown.decoding import DecodeLoop
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import cache_argument
from countdown.methods import method
from countdown.modules import sparse_modules
from tiny import gemma3, llama, spread

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])


def own_text(model: nn.Module, tokens: int) -> Tensor:
    """What `generate` writes after `IDS`."""
    return model.generate(IDS, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]


def causal_lm(model_type: str, **more: Any) -> nn.Module:
    """A model whose head is not tied: it does not say its input again and again."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 53, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 257, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**sizes, **more})
    model = spread(AutoModelForCausalLM.from_config(config).eval())
    model.get_output_embeddings().weight = nn.Parameter(torch.randn(257, 32))
    return model


def test_it_writes_what_generate_writes():
    model = llama()
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    started = DecodeLoop(model, IDS, new_tokens=12)
    assert torch.equal(torch.cat([started.run(5), started.run(7)]), expected)
    with pytest.raises(ConfigError, match="1 more tokens do not fit the cache, 0 are left"):
        started.run(1)


@pytest.mark.parametrize("name", ["m-countdown", "teal"])
def test_sparse_it_writes_what_generate_writes(name, tokenizer, text):
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method(name, sparsity=0.5), tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    countdown.reset_counters(model)
    started = DecodeLoop(model, IDS, new_tokens=8)
    assert torch.equal(started.run(8), expected)
    # The first token is the prompt's; neither warming up counts nor what was never fed.
    assert {site.tokens for site in countdown.status(model)} == {7}


@pytest.mark.parametrize("window", [4, 64])
def test_where_attention_slides_over_a_window_old_tokens_are_hidden(window):
    model = gemma3(sliding_window=window, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    assert torch.equal(DecodeLoop(model, IDS, new_tokens=12).run(12), expected)


def test_latent_attention_keeps_what_does_not_fit_our_kernels():
    from transformers import YoutuConfig, YoutuForCausalLM

    torch.manual_seed(4)
    # Values narrower than keys, and a linear that runs over the whole cache.
    config = YoutuConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
        vocab_size=259, max_position_embeddings=256, initializer_range=0.5,
    )  # fmt: skip
    model = YoutuForCausalLM(config).eval()
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    assert len(set(expected.tolist())) > 2
    started = DecodeLoop(model, IDS, new_tokens=8)
    assert torch.equal(started.run(8), expected)
    assert not any("kv_b_proj" in name for name, m in model.named_modules() if [m] in started.linears)


MAMBA = {"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# What keeps more of a text than keys and values.
HYBRIDS = {
    "bamba": {"attn_layer_indices": [1], **MAMBA, "mamba_d_head": 16},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "mamba_expand": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "olmo_hybrid": DELTA,
    "qwen3_5_text": DELTA,
}


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_states_of_convolutions_and_recurrences_go_on_after_the_prompt(model_type):
    model = causal_lm(model_type, **HYBRIDS[model_type])
    expected = own_text(model, 12)
    assert len(set(expected.tolist())) > 4
    started = DecodeLoop(model, IDS, new_tokens=12)
    assert torch.equal(started.run(2), expected[:2])
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.cat([IDS, expected[None, :1]], dim=1), **cache_argument(model, own))
    for layer, expected_layer in zip(started.cache.layers, own.layers, strict=True):
        for states in ("conv_states", "recurrent_states"):
            of_loop, expected_states = getattr(layer, states, {}), getattr(expected_layer, states, {})
            torch.testing.assert_close(of_loop, expected_states, rtol=1e-3, atol=1e-4)
    assert torch.equal(started.run(10), expected[2:])
    made_sparse(model, per_term=2.0)
    sparse = own_text(model, 12)
    assert not torch.equal(sparse, expected)
    assert torch.equal(DecodeLoop(model, IDS, new_tokens=12).run(12), sparse)


def test_states_that_are_kept_in_modules_are_refused():
    model = causal_lm("recurrent_gemma", block_types=["recurrent", "attention"], lru_width=32)
    expected = own_text(model, 12)
    with pytest.raises(UnsupportedModelError, match="layer 0 keeps nothing of a prompt in the cache"):
        DecodeLoop(model, IDS, new_tokens=12)
    assert torch.equal(own_text(model, 12), expected)


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    },
    "original_max_position_embeddings": 16, "max_position_embeddings": 64,
}  # fmt: skip


def by_the_loop(model: nn.Module, tokens: int) -> Tensor:
    """What the loop writes; or `generate`, in a transformers whose rotations ask for the length in Python."""
    try:
        return DecodeLoop(model, IDS, new_tokens=tokens).run(tokens)
    except UnsupportedModelError as error:
        if "reads the value of a tensor in Python" not in str(error):
            raise
        return own_text(model, tokens)


def test_a_model_that_starts_again_where_its_rotations_change_is_refused():
    model = causal_lm("phi3", **LONGROPE)
    expected = own_text(model, 30)
    with pytest.raises(UnsupportedModelError, match="Phi3ForCausalLM starts again without its cache at token 17"):
        DecodeLoop(model, IDS, new_tokens=30)
    assert torch.equal(own_text(model, 30), expected)
    # The eighth new token is not fed.
    assert torch.equal(by_the_loop(model, 8), expected[:8])
    with pytest.raises(UnsupportedModelError, match="starts again"):
        DecodeLoop(model, IDS, new_tokens=10)


def test_rotations_that_depend_on_the_length_are_followed_or_refused():
    model = causal_lm("llama", **LONGROPE)
    expected = own_text(model, 30)
    assert torch.equal(by_the_loop(model, 30), expected)
    model = causal_lm("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    before = model.model.rotary_emb.inv_freq.clone()
    with pytest.raises(UnsupportedModelError, match=r"rotations anew as a text grows \(model\.rotary_emb\)"):
        DecodeLoop(model, IDS, new_tokens=30)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


class Remembering(nn.Module):
    """A norm that also adds what it has seen of the text, kept in one of the ways that models have found."""

    def __init__(self, norm: nn.Module, how: str) -> None:
        super().__init__()
        self.norm, self.how = norm, how
        self.seen = torch.zeros(1, 24)
        self.register_buffer("sums", torch.zeros(1, 24))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            self.sums.zero_()
            self.seen = torch.zeros(1, 24)
        if self.how == "buffer":
            self.sums.add_(x[:, -1])
        else:
            self.seen = self.seen + x[:, -1]
        return self.norm(x) + self.sums[:, None] + self.seen[:, None]


@pytest.mark.parametrize("how, refused", [("buffer", None), ("attribute", "puts another tensor in place of 'seen'")])
def test_what_a_module_remembers_is_restored_or_refused(how, refused):
    model = llama()
    model.model.norm = Remembering(model.model.norm, how)
    expected = own_text(model, 12)
    if refused is None:
        assert torch.equal(DecodeLoop(model, IDS, new_tokens=12).run(12), expected)
        return
    with pytest.raises(UnsupportedModelError, match=refused):
        DecodeLoop(model, IDS, new_tokens=12)
    assert torch.equal(own_text(model, 12), expected)


def test_a_step_that_computes_something_else_than_the_model_is_refused(monkeypatch):
    model = llama()
    prepare = type(model).prepare_inputs_for_generation

    def other_token(self, ids, *args, **kwargs):
        return prepare(self, ids + (ids.shape[1] > IDS.shape[1]), *args, **kwargs)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", other_token)
    with pytest.raises(UnsupportedModelError, match=r"something else in the .* first logits are \d+% off"):
        DecodeLoop(model, IDS, new_tokens=4)

    def shifted(self, *args, position_ids=None, **kwargs):
        return prepare(self, *args, position_ids=position_ids + 3 * (position_ids == IDS.shape[1] + 1), **kwargs)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", shifted)
    DecodeLoop(model, IDS, new_tokens=2)
    with pytest.raises(UnsupportedModelError, match="counts positions otherwise than one by one"):
        DecodeLoop(model, IDS, new_tokens=4)


@pytest.mark.parametrize("dtype, dropping", [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_short_dtypes_are_compared_with_nothing_dropped(dtype, dropping, monkeypatch):
    compared: list[Tensor] = []
    monkeypatch.setattr(
        decoding, "_check_agreement", lambda model, *logits: compared.extend(each.clone() for each in logits)
    )
    model = llama(dtype)
    made_sparse(model, per_term=-1.0)
    DecodeLoop(model, IDS, new_tokens=4)
    for site in sparse_modules(model).values():
        site.per_term.fill_(5.0)  # drops most
    expected = own_text(model, 4)
    countdown.reset_counters(model)
    loop = DecodeLoop(model, IDS, new_tokens=4)
    torch.testing.assert_close(compared[2], compared[3], rtol=0.05, atol=0.05)
    for place in (2, 3):
        difference = (compared[place] - compared[place - 2]).float().norm() / compared[place].float().norm()
        assert (difference > 0.1) == dropping
    # What is written afterwards drops.
    assert torch.equal(loop.run(4), expected)
    assert all(site.realised_sparsity > 0.5 for site in countdown.status(model))


def test_a_model_copied_under_inference_mode_decodes_outside_of_it():
    model = llama(torch.bfloat16)
    made_sparse(model, per_term=0.5)
    with torch.inference_mode():
        other = copy.deepcopy(model)
    assert torch.equal(DecodeLoop(other, IDS, new_tokens=4).run(4), own_text(model, 4))


def test_a_model_that_prepares_no_positions_counts_by_itself(monkeypatch):
    model = llama()
    prepare = type(model).prepare_inputs_for_generation

    def without(self, *args, **kwargs):
        return prepare(self, *args, **kwargs) | {"position_ids": None}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", without)
    assert torch.equal(DecodeLoop(model, IDS, new_tokens=12).run(12), own_text(model, 12))


def test_a_window_that_only_the_cache_keeps_is_refused_where_it_is_full():
    model = causal_lm("moshi", num_codebooks=2, audio_vocab_size=20, sliding_window=12)
    expected = own_text(model, 12)
    with pytest.raises(UnsupportedModelError, match="MoshiForCausalLM attends to tokens that its cache would let go"):
        DecodeLoop(model, IDS, new_tokens=12)
    assert torch.equal(own_text(model, 12), expected)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_whatever_fails_on_the_way_is_said_in_a_line_and_the_model_left_as_it_was(at, monkeypatch):
    model = llama()
    forward, calls = type(model.model.norm).forward, []

    def failing(self, x):
        calls.append(self is model.model.norm)
        if sum(calls) == at:
            raise IndexError("no such\nplace")
        return forward(self, x)

    monkeypatch.setattr(type(model.model.norm), "forward", failing)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM does not run .* IndexError: no such place$"):
        DecodeLoop(model, IDS, new_tokens=4)
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_parts_that_never_chose_an_attention_keep_none():
    model = causal_lm("moshi", audio_encoder_config={"model_type": "mimi"}, num_codebooks=2, audio_vocab_size=20)
    before = model.config.audio_encoder_config._attn_implementation
    assert before is None
    with suppress(UnsupportedModelError):  # in some versions of transformers
        DecodeLoop(model, IDS, new_tokens=6)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.audio_encoder_config._attn_implementation is None


def test_a_loop_goes_on_with_the_weights_it_started_with(tokenizer, text):
    model = llama()
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    started = DecodeLoop(model, IDS, new_tokens=12)
    profile = countdown.calibrate(model, tokenizer, text, method("cats", sparsity=0.9), tokens=512, progress=False)
    countdown.sparsify_(model, profile)  # stores W_down anew and lets go of what was
    _ = [torch.full((53, 24), float("nan")) for _ in range(50)]
    assert torch.equal(started.run(12), expected)


def test_the_model_is_left_as_it_was():
    model = llama()
    before = model.config._attn_implementation
    DecodeLoop(model, IDS, new_tokens=2)
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert not sparse_modules(model)


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="longer than the model's context of 64"):
        DecodeLoop(llama(max_position_embeddings=64), IDS, new_tokens=64)
    monkeypatch.setattr(decoding, "DEVICES", ("cuda",))
    with pytest.raises(ConfigError, match="runs on cuda, and the model is on cpu"):
        DecodeLoop(llama(), IDS, new_tokens=4)


def test_the_step_runs_in_our_projections_and_attention(monkeypatch):
    class Operations(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.seen.append(op.name())
            return op(*args, **(kwargs or {}))

    def watched(step):
        with Operations():
            step()
        return recorded(step)

    recorded = decoding.recorded
    monkeypatch.setattr(decoding, "recorded", watched)
    DecodeLoop(llama(), IDS, new_tokens=6)
    # Of each layer q, k and v together, o, gate and up together, down; and the head.
    assert Operations.seen.count("countdown::project") == 4 * 3 + 1
    assert Operations.seen.count("countdown::attend_one") == 3
    assert not [name for name in Operations.seen if name in ("aten::mm", "aten::addmm", "aten::bmm")]


def test_a_sparse_linear_with_a_forward_of_its_own_runs_by_itself(tokenizer, text, monkeypatch):
    # As on a GPU, where linears that read the same input share a launch.
    monkeypatch.setattr(one_token, "_on_gpu", lambda site: True)
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("teal", sparsity=0.5), tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    loop = DecodeLoop(model, IDS, new_tokens=8)
    assert [len(group) for group in loop.linears[:2]] == [3, 2]
    assert torch.equal(loop.run(8), expected)
    key = model.model.layers[0].self_attn.k_proj
    before = key.forward
    key.forward = lambda x: before(x) * 2
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    assert torch.equal(DecodeLoop(model, IDS, new_tokens=8).run(8), expected)
    assert "forward" in vars(key)


OTHER = torch.tensor([[5, 17, 90, 7, 7, 12]])


def after(model: nn.Module, prompt: Tensor, tokens: int) -> Tensor:
    return model.generate(prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]


@pytest.mark.parametrize("model_type", [*HYBRIDS, "llama", "gemma3_text"])
def test_prompt_after_prompt_in_what_was_traced_once(model_type, monkeypatch):
    model = causal_lm(model_type, **HYBRIDS.get(model_type, {}))
    expected = [after(model, prompt, 9) for prompt in (IDS, OTHER)]
    assert not torch.equal(*expected)
    started = DecodeLoop(model, IDS, new_tokens=9)
    monkeypatch.setattr(decoding, "recorded", None)  # nothing is traced again
    for round_ in range(2):
        assert torch.equal(started.run(9), expected[round_ % 2])
        started.restart((OTHER, IDS)[round_ % 2], new_tokens=9)
    assert torch.equal(started.run(9), expected[0])


def test_restarting_sparse_counts_and_writes_what_generate_does(tokenizer, text):
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    expected = after(model, OTHER, 8)
    started = DecodeLoop(model, IDS, new_tokens=8)
    started.run(3)
    countdown.reset_counters(model)
    started.restart(OTHER, new_tokens=8)
    assert torch.equal(started.run(8), expected)
    assert {site.tokens for site in countdown.status(model)} == {7}


@pytest.mark.parametrize("kept", [3, 5])
def test_the_beginning_of_a_prompt_can_be_kept(kept, tokenizer, text):
    model = llama()
    profile = countdown.calibrate(model, tokenizer, text, method("m-countdown"), tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    prompt = torch.cat([IDS[:, :kept], OTHER[:, -1:]], dim=1) if kept == 5 else OTHER
    expected = after(model, prompt, 8)
    started = DecodeLoop(model, IDS, new_tokens=8)
    started.run(6)
    assert started.can_keep
    countdown.reset_counters(model)
    # Of five, the one token that is left is a prompt all the same, and dense.
    started.restart(prompt, new_tokens=8, kept=kept)
    assert {site.tokens for site in countdown.status(model)} == {0}
    assert torch.equal(started.run(8), expected)


@pytest.mark.parametrize("model_type", ["bamba", "lfm2", "falcon_h1"])
def test_states_cannot_be_kept_for_another_text(model_type):
    assert not DecodeLoop(causal_lm(model_type, **HYBRIDS[model_type]), IDS, new_tokens=4).can_keep


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "bamba", "lfm2", "qwen3_5_text"])
def test_a_cache_grows_in_the_middle_of_a_text(model_type):
    model = causal_lm(model_type, **HYBRIDS.get(model_type, {}))
    expected = own_text(model, 150)
    started = DecodeLoop(model, IDS, new_tokens=5)
    written = [started.run(5)]
    started.grow(200, torch.cat([IDS, written[0][None, :-1]], dim=1), new_tokens=145)
    written.append(started.run(145))
    assert torch.equal(torch.cat(written), expected)


def test_what_does_not_fit_the_room_is_refused():
    started = DecodeLoop(llama(), IDS, new_tokens=4, room=20)
    started.run(4)
    with pytest.raises(ConfigError, match="the cache has room for 20 tokens, not 21"):
        started.restart(OTHER, new_tokens=15)
    with pytest.raises(ConfigError, match="context"):
        started.grow(100_000, IDS, new_tokens=4)


def test_another_token_than_the_likeliest_can_go_on():
    model = llama()
    started = DecodeLoop(model, IDS, new_tokens=3)
    started.advance()
    started.token.fill_(77)
    logits = started.advance().clone()
    with torch.no_grad():
        expected = model(torch.cat([IDS, torch.tensor([[77]])], dim=1)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
