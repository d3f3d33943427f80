"""One budget over many sites: met, spent where it hurts least, and within bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from countdown.allocation.global_budget import AT_MOST, allocate

GRID = torch.arange(1000, dtype=torch.float64) / 1000


@settings(max_examples=60, deadline=None)
@given(
    scales=st.lists(st.floats(0, 1e4), min_size=1, max_size=12),
    powers=st.integers(1, 6),
    sparsity=st.floats(0, 0.995),
    seed=st.integers(0, 100),
)
def test_the_budget_is_met_within_bounds(scales, powers, sparsity, seed):
    sizes = torch.randint(1, 1000, (len(scales),), generator=torch.Generator().manual_seed(seed))
    errors = torch.tensor(scales)[:, None] * GRID**powers
    shares = allocate(errors, sizes, sparsity)
    assert (shares * sizes).sum() / sizes.sum() == pytest.approx(sparsity, abs=2e-3)
    assert shares.min() >= 0
    assert shares.max() <= max(AT_MOST, (1 + sparsity) / 2)


def test_sites_alike_get_alike():
    shares = allocate((GRID**3).expand(4, -1), torch.ones(4), 0.7)
    assert shares.tolist() == pytest.approx([0.7] * 4, abs=1e-3)


def test_quadratic_errors_have_the_textbook_answer():
    # min Σ c k² under Σ size·k = budget: k ∝ size / c.
    sizes = torch.tensor([1.0, 1.0, 2.0])
    shares = allocate(torch.tensor([1.0, 2.0, 4.0])[:, None] * GRID**2, sizes, 0.3)
    one = 0.3 * 4 / (1 + 0.5 + 2 * 0.5)
    assert shares.tolist() == pytest.approx([one, one / 2, one / 2], abs=2e-3)


def test_scales_far_apart_are_told_apart():
    shares = allocate(torch.tensor([1e33, 1.0, 4.0]).double()[:, None] * GRID**2, torch.ones(3), 0.3)
    assert shares.tolist() == pytest.approx([0, 0.72, 0.18], abs=2e-3)


def test_no_other_split_is_cheaper():
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(5, 1, generator=generator) * GRID ** (1 + 4 * torch.rand(5, 1, generator=generator))
    sizes = torch.ones(5)
    best = allocate(errors, sizes, 0.6)

    def cost(shares):
        return sum(float(errors[site, int(k * 1000)]) for site, k in enumerate(shares.tolist()))

    for _ in range(300):
        step = torch.randn(5, generator=generator) * 0.05
        other = best + step - step.mean()
        if other.min() >= 0 and other.max() < AT_MOST:
            assert cost(best) <= cost(other) + 5e-3


def test_a_site_that_costs_nothing_takes_what_it_may():
    shares = allocate(torch.stack([torch.zeros(1000).double(), GRID**2]), torch.ones(2), 0.5)
    assert shares[0] == pytest.approx(AT_MOST, abs=2e-3)
    assert shares[1] == pytest.approx(1 - AT_MOST, abs=2e-3)
