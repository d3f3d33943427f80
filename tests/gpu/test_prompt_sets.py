"""Sets chosen from prompts on a CUDA device: batches with padding, static caches, captured loops."""

from __future__ import annotations

import copy

import pytest
import torch

import countdown
from calls import written
from countdown.decoding import DecodeLoop
from countdown.methods import method
from tiny import FAMILIES, byte_tokenizer

pytestmark = pytest.mark.gpu
IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def griffin(family):
    model = FAMILIES[family]()
    profile = countdown.calibrate(model, byte_tokenizer(), [], method("griffin"), progress=False)
    return countdown.sparsify_(model, profile)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_padded_batch_is_written_as_on_the_cpu(family, more):
    model = griffin(family)
    expected = torch.cat([written(model, IDS[:1, 5:]), written(model, IDS[1:])])
    other = copy.deepcopy(model).cuda()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    countdown.reset_counters(other)
    found = written(other, IDS, attention_mask=mask, **more)
    assert torch.equal(found, expected)
    for site in countdown.status(other):
        assert (site.backend, site.tokens) == ("triton", 2 * 11)
        assert site.realised_sparsity == pytest.approx(26 / 53)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_loops_keep_the_sets_of_their_prompts(family):
    model = griffin(family)
    expected = [written(model, IDS[row : row + 1])[0].tolist() for row in range(2)]
    model.cuda()
    loops = [DecodeLoop(model, IDS[row : row + 1], new_tokens=12) for row in range(2)]
    countdown.reset_counters(model)
    found: list[list[int]] = [[], []]
    for _ in range(4):
        for loop, tokens in zip(loops, found, strict=True):
            tokens.extend(loop.run(3).tolist())
    assert found == expected
    assert {site.tokens for site in countdown.status(model)} == {2 * 11}
