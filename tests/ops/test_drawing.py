"""The op that draws a token: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import kernel_cases as cases
from countdown.engine.sampling import Sampling, as_array, remaining
from countdown.ops import drawing
from countdown.ops.triton import drawing_ops
from crossing import crossed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOTHING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.9},
    {"temperature": 1.5, "top_p": 1e-6},
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 30.0, "top_k": 7, "top_p": 0.5},
    {"top_k": 10**9, "top_p": 0.99999},
]


def logits_of(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (3 * cases.inputs(1, n, torch.float32, DEVICE, seed)).to(dtype)


@crossed(n=[1, 700, 2500], dtype=cases.TOLERANCE, settings=SETTINGS)
def test_the_kernels_draw_what_the_reference_draws(n, dtype, settings):
    for seed in (0, 2**40 + 7):
        logits = logits_of(n, dtype, seed % 11)
        given = {**NOTHING, **settings, "seed": seed}
        with cases.poisoned():
            token, most = drawing_ops.draw_one(logits, **given)
        assert token.tolist() == drawing.draw_one(logits, **given)[0].tolist()
        assert most.tolist() == [float(logits.max())]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_left_is_what_the_cpu_leaves(settings):
    """Under noise that is the same for all tokens the least likely of those that are left can be drawn as any other."""
    logits = logits_of(300, torch.float32, 3)
    given = {**NOTHING, **settings}
    drawn = {int(drawing.draw_one(logits, **given, seed=seed)[0]) for seed in range(400)}
    tokens, probabilities = remaining(as_array(logits[0]), Sampling(**given))
    left = np.arange(300) if tokens is None else tokens
    assert drawn <= set(left[probabilities > 0].tolist())


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 1.0, 2.0, -20.0, 1.0]], device=DEVICE)
    drawn = [int(drawing.draw_one(logits, **NOTHING, seed=seed)[0]) for seed in range(4000)]
    shares = torch.tensor([drawn.count(token) / 4000 for token in range(5)])
    torch.testing.assert_close(shares, logits[0].softmax(-1).cpu(), atol=0.03, rtol=0)


def test_the_noise_is_that_of_exponentials():
    # Mean and variance of a Gumbel distribution.
    noise = drawing.gumbel(5, 200_000).astype(np.float64)
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.02)
    # A published vector of Philox 4x32-10: counter and key 0.
    assert hex(drawing.random_bits(0, 1)[0]) == "0x6627e8d5"


@pytest.mark.parametrize("op", [drawing.draw_one, drawing_ops.draw_one])
def test_logits_that_are_no_numbers_are_reported(op):
    logits = logits_of(700, torch.float32, 0)
    logits[0, 600] = torch.nan
    token, most = op(logits, 1.0, 5, 0.9, 0.1, 3)
    assert token.tolist() == [[600]]
    assert most.isnan().all()


@pytest.mark.parametrize("op", [drawing.draw_one, drawing_ops.draw_one])
@pytest.mark.parametrize("settings", [(1, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05)], ids=str)
def test_one_that_is_left_alone_is_drawn_however_unlikely_its_noise(settings, op):
    logits = logits_of(300, torch.float32, 0)
    logits[0, 94] = 60.0
    seed = 4696  # of which the bits at this place are among the largest of all
    assert drawing.random_bits(seed, 95)[94] > 2**32 - 129
    assert op(logits, 1.0, *settings, seed)[0].tolist() == [[94]]


@pytest.mark.parametrize("op", [drawing.draw_one, drawing_ops.draw_one])
def test_of_equals_all_are_left(op):
    logits = torch.full((1, 40), -float("inf"), device=DEVICE)
    logits[0, 7:27] = 2.0
    drawn = {int(op(logits, 1.0, 1, 0.5, 0.9, seed)[0]) for seed in range(9)}
    assert drawn <= set(range(7, 27))
    assert len(drawn) > 4


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}], ids=str
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*, expected"):
        drawing.draw_one(torch.zeros(1, 4), **{**NOTHING, **wrong}, seed=0)


def test_opcheck():
    torch.library.opcheck(torch.ops.countdown.draw_one, (torch.randn(1, 40, device=DEVICE), 0.7, 5, 0.9, 0.1, 3))
