"""Decode loops that advance together."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import countdown
from calls import made_sparse
from countdown import replay
from countdown.decoding import DecodeLoop
from countdown.errors import ConfigError
from countdown.fusing import together
from countdown.joint import MOST_JOINED, Joint
from countdown.methods import method
from countdown.ops.cpu import library
from fused_loop import FusedLoop
from test_decoding import IDS, own_text
from tiny import gemma3, llama


def joined(
    model: nn.Module, prompts: list[Tensor], tokens: int, kind: type[DecodeLoop] = DecodeLoop
) -> tuple[list[DecodeLoop], list[list[int]], Joint]:
    """Loops that advance together, and what they write."""
    loops = [kind(model, prompt, new_tokens=tokens, room=40 * (1 + n % 2)) for n, prompt in enumerate(prompts)]
    joint, texts = Joint(), [[] for _ in loops]
    for _ in range(tokens):
        joint.advance(loops)
        for loop, text in zip(loops, texts, strict=True):
            assert int(loop.current.argmax()) == int(loop.token)
            text.append(int(loop.token))
    return loops, texts, joint


PROMPTS = [IDS[:, : 8 - n] + n for n in range(8)]


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("make", [llama, gemma3])
def test_loops_that_advance_together_have_the_bits_they_have_alone(make, count):
    model = make().bfloat16()
    loops, texts, joint = joined(model, PROMPTS[:count], 6)
    for prompt, loop, text in zip(PROMPTS, loops, texts, strict=False):
        alone = DecodeLoop(model, prompt, new_tokens=6)
        assert alone.run(6).tolist() == text
        assert torch.equal(alone.current, loop.current)
    # Of each layer three products of all, and the head.
    (group,) = joint._known.values()
    assert group.step() is not None


# As a CPU has loops, and as a GPU.
KINDS = [DecodeLoop, FusedLoop]


@pytest.mark.parametrize("make", [llama, gemma3])
def test_loops_of_a_gpu_that_advance_together_are_alike_to_rounding(make):
    model = make()
    loops, texts, _ = joined(model, PROMPTS, 6, FusedLoop)
    for prompt, loop, text in zip(PROMPTS, loops, texts, strict=False):
        alone = FusedLoop(model, prompt, new_tokens=6)
        assert alone.run(6).tolist() == text
        torch.testing.assert_close(alone.current, loop.current)
    # Each weight is read once.
    steps = together.together([loop.traced for loop in loops], sparse_up_to=8)
    rows = Counter(ones[0].name for ones, rows in steps._alike if rows)
    assert rows["countdown::project"] == 3 * model.config.num_hidden_layers + 1


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_loops_that_advance_together_are_alike_to_rounding(kind):
    model = llama()
    made_sparse(model, per_term=0.3)
    loops, texts, _ = joined(model, PROMPTS[:4], 6, kind)
    counted = {site.tokens for site in countdown.status(model)}
    assert counted == {4 * 5}
    for prompt, loop, text in zip(PROMPTS, loops, texts, strict=False):
        alone = kind(model, prompt, new_tokens=6)
        assert alone.run(6).tolist() == text
        torch.testing.assert_close(alone.current, loop.current)


def test_weights_are_read_once_for_all():
    model = llama()
    loops, _, _ = joined(model, PROMPTS[:3], 2)
    calls = [call for of_operation in loops[0]._replay._calls for call in of_operation]
    alone = sum(isinstance(call, library.Ran) and isinstance(call.call, library.ProjectCall) for call in calls)
    assert alone == 4 * model.config.num_hidden_layers + 1
    of_all = replay._joint_calls([loop.traced for loop in loops], 8)
    products = [call.call for call in of_all if isinstance(call, library.Ran) and hasattr(call.call, "biases")]
    assert [call.tokens for call in products] == [3] * alone


@pytest.mark.parametrize("kind", KINDS)
def test_loops_of_two_models_are_not_mixed(kind):
    loops = [kind(model, IDS, new_tokens=4) for model in (llama(), llama().bfloat16())]
    expected = [own_text(loop.model, 4).tolist() for loop in loops]
    joint, texts = Joint(), [[], []]
    for _ in range(4):
        joint.advance(loops)
        for loop, text in zip(loops, texts, strict=True):
            text.append(int(loop.token))
    assert texts == expected


def test_a_loop_without_room_stops_all_before_anything_is_computed():
    model = llama()
    loops = [DecodeLoop(model, IDS, new_tokens=tokens) for tokens in (3, 1)]
    joint = Joint()
    joint.advance(loops)
    with pytest.raises(ConfigError, match="0 are left"):
        joint.advance(loops)
    assert loops[0].run(2).tolist() == own_text(model, 3)[1:].tolist()


def test_what_is_joined_is_kept_for_few_groups_and_forgotten():
    model = llama()
    loops = [DecodeLoop(model, IDS + n, new_tokens=60) for n in range(7)]
    joint = Joint()
    for bits in range(3, 128):
        some = [loop for n, loop in enumerate(loops) if bits >> n & 1]
        if len(some) == 3:
            joint.advance(some)
    assert len(joint._known) <= MOST_JOINED
    joint.forget(loops[:3])
    assert len(joint._known) <= 1
    joint.forget([])
    assert not joint._known


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "m-countdown"}, {"name": "d-proxy"}, {"name": "teal"}, {"name": "d-proxy", "compensate": "affine"},
        {"name": "cats", "second_look": 0.2},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)  # fmt: skip
def test_more_loops_than_sparse_ones_are_dense(settings, kind, tokenizer, text):
    model = llama()
    config = method(**settings, sparsity=0.6)
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)
    expected = [DecodeLoop(model, prompt, new_tokens=5) for prompt in PROMPTS[:3]]
    texts = [loop.run(5).tolist() for loop in expected]
    countdown.sparsify_(model, profile)
    countdown.reset_counters(model)
    loops, joint = [kind(model, prompt, new_tokens=5) for prompt in PROMPTS[:3]], Joint(sparse_up_to=2)
    written: list[list[int]] = [[], [], []]
    for _ in range(5):
        joint.advance(loops)
        for loop, text_ in zip(loops, written, strict=True):
            text_.append(int(loop.token))
    assert written == texts
    for loop, dense in zip(loops, expected, strict=True):
        torch.testing.assert_close(loop.current, dense.current)
    # Counted as what they are: dense.
    assert {(site.tokens, site.realised_sparsity) for site in countdown.status(model)} == {(3 * 4, 0.0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse_up_to", [2, 8])
def test_loops_that_look_twice_advance_together(kind, sparse_up_to, tokenizer, text):
    model = llama()
    config = method("m-countdown", sparsity=0.6, second_look=0.2)
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=512, progress=False)
    countdown.sparsify_(model, profile)
    alone = [kind(model, prompt, new_tokens=5) for prompt in PROMPTS[:2]]
    texts = [loop.run(5).tolist() for loop in alone]
    looks = [site.looks for site in countdown.status(model)]
    assert all(0.6 > first > second > 0.05 for first, second in looks)
    countdown.reset_counters(model)
    loops, joint = [kind(model, prompt, new_tokens=5) for prompt in PROMPTS[:2]], Joint(sparse_up_to=sparse_up_to)
    for _ in range(5):
        joint.advance(loops)
    for loop, one in zip(loops, alone, strict=True):
        torch.testing.assert_close(loop.current, one.current)
    assert [int(loop.token) for loop in loops] == [text_[-1] for text_ in texts]
    assert [site.looks for site in countdown.status(model)] == looks


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_reference_computes_stays_sparse(kind):
    model = llama()
    made_sparse(model, per_term=0.3)  # weights are not laid out
    loops, joint = [kind(model, prompt, new_tokens=4) for prompt in PROMPTS[:3]], Joint(sparse_up_to=2)
    for _ in range(4):
        joint.advance(loops)
    assert all(site.realised_sparsity > 0.1 for site in countdown.status(model))
