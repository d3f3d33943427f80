"""The decode loop on a CPU."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import countdown
from countdown import decoding
from countdown.decoding import DecodeLoop
from countdown.errors import ConfigError
from countdown.methods import method
from countdown.modules import sparse_modules
from tiny import gemma3, llama

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])


def test_it_writes_what_generate_writes():
    model = llama()
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    started = DecodeLoop(model, IDS, new_tokens=12)
    assert torch.equal(torch.cat([started.run(5), started.run(7)]), expected)
    with pytest.raises(ConfigError, match="1 more tokens do not fit the cache, 0 are left"):
        started.run(1)


def test_sparse_it_writes_what_generate_writes(tokenizer, text):
    model = llama()
    profile = countdown.calibrate(
        model, tokenizer, text, method("m-countdown", sparsity=0.5), tokens=512, progress=False
    )
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
    assert Operations.seen.count("countdown::project_one") == 4 * 3 + 1
    assert Operations.seen.count("countdown::attend_one") == 3
    assert not [name for name in Operations.seen if name in ("aten::mm", "aten::addmm", "aten::bmm")]
