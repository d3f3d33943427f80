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
    share = (values.float().abs() <= sketch.quantile(q)).double().mean().item()
    assert share == pytest.approx(q, abs=0.008 if kind == "bfloat16" else 0.004)


def test_the_order_of_adding_does_not_matter():
    values = torch.randn(1000)
    one, other = MagnitudeSketch(), MagnitudeSketch()
    one.add(values)
    for part in values.flip(0).split(7):
        other.add(part.view(1, -1))
    assert torch.equal(one.counts, other.counts)
    assert one.total == 1000


def test_quantile_zero_keeps_everything_even_zeros():
    sketch = MagnitudeSketch()
    sketch.add(torch.tensor([0.0, -0.0, 1.0]))
    assert sketch.quantile(0.0) == -1.0
    # Two thirds are zeros of either sign; dropping half drops them and nothing else.
    assert 0 <= sketch.quantile(0.5) < 1e-30


def test_survives_a_round_trip():
    sketch = MagnitudeSketch()
    sketch.add(torch.randn(500))
    again = MagnitudeSketch.from_tensors(**sketch.to_tensors())
    assert torch.equal(again.counts, sketch.counts)


def test_bad_input():
    with pytest.raises(ValueError, match="empty"):
        MagnitudeSketch().quantile(0.5)
    with pytest.raises(ValueError, match="0 ≤ q < 1"):
        MagnitudeSketch().quantile(1.0)
    with pytest.raises(ValueError, match="bins within range"):
        MagnitudeSketch.from_tensors(torch.tensor([1 << 20]), torch.tensor([1]))
