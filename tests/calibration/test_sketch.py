"""The sketch against exact quantiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from countdown.calibration.sketch import MagnitudeSketch


def draw(kind: str, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=generator)
    return {
        "normal": normal,
        "heavy": normal / torch.rand(n, generator=generator).clamp_min(1e-6),
        "tiny": normal * 1e-30,
        "bfloat16": normal.bfloat16(),
        "two scales": torch.where(normal > 0, normal * 1e4, normal * 1e-4),
    }[kind]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["normal", "heavy", "tiny", "bfloat16", "two scales"]),
    q=st.floats(0.01, 0.99),
    seed=st.integers(0, 100),
)
def test_the_share_at_or_below_a_quantile_is_what_was_asked(kind, q, seed):
    values = draw(kind, 20_000, seed)
    sketch = MagnitudeSketch()
    for part in values.split(3_000):
        sketch.add(part)
    share = (values.double().abs() <= sketch.quantiles(torch.tensor([q]))).double().mean().item()
    assert share == pytest.approx(q, abs=0.008 if kind == "bfloat16" else 0.004)


def test_the_order_of_adding_does_not_matter():
    values = torch.randn(1000)
    one, other = MagnitudeSketch(), MagnitudeSketch()
    one.add(values)
    for part in values.flip(0).split(7):
        other.add(part.view(1, -1))
    assert torch.equal(one.counts, other.counts)
    assert int(one.counts.sum()) == 1000


def test_several_quantiles_at_once_rise():
    sketch = MagnitudeSketch()
    sketch.add(torch.randn(5000))
    q = torch.linspace(0.001, 0.999, 300)
    together = sketch.quantiles(q)
    assert (together.diff() > 0).all()
    assert torch.equal(together[7:8], sketch.quantiles(q[7:8]))


def test_zeros_of_either_sign_are_the_smallest():
    sketch = MagnitudeSketch()
    sketch.add(torch.tensor([0.0, -0.0, 1.0]))
    # Two thirds are zeros; dropping half drops them and nothing else.
    assert 0 <= sketch.quantiles(torch.tensor([0.5])).item() < 1e-30


def test_bad_input():
    with pytest.raises(ValueError, match="empty"):
        MagnitudeSketch().quantiles(torch.tensor([0.5]))
    for outside in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
            MagnitudeSketch().quantiles(torch.tensor([0.5, outside]))
