"""A second look, calibrated: what both looks leave is what was asked for, and it is the larger coefficients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import countdown
from countdown.calibration.looks import Looks
from countdown.calibration.sketch import PairSketch
from countdown.errors import ConfigError
from countdown.methods import method
from countdown.profiles.profile import Profile
from countdown.sparsify import status
from tiny import llama

LOOK = 0.2


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    share=st.floats(0.01, 0.99), kept=st.floats(0.05, 1.0), scale=st.sampled_from([2.0**-90, 1e-5, 1.0, 2.0**60]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_a_share_of_all_pairs_lies_above_both_thresholds(share, kept, scale, seed):
    first = numbers(60_000, seed=seed).abs() * scale
    second = first * numbers(60_000, seed=seed + 100).abs() * scale**-0.3
    sketch = PairSketch()
    for some in torch.stack([first, second]).view(2, 3, -1).unbind(1):
        sketch.add(*some)
    threshold = first.double().quantile(share)
    wanted = kept * float((first > threshold).double().mean())
    found = sketch.second_quantiles(threshold[None], torch.tensor([wanted]))
    assert found.dtype == torch.float64
    above = float(((first > threshold) & (second > found)).double().mean())
    assert above == pytest.approx(wanted, abs=0.004)


def test_of_all_pairs_nothing_is_left_out_by_the_first():
    sketch = PairSketch()
    sketch.add(torch.zeros(1000), torch.linspace(0, 1, 1000))
    found = sketch.second_quantiles(torch.tensor([-1.0, -1.0]), torch.tensor([0.25, 1.0]))
    assert found.tolist() == pytest.approx([0.75, 0.0], abs=0.01)
    # There are fewer than this whose first is larger.
    assert sketch.second_quantiles(torch.tensor([0.5]), torch.tensor([0.9])).tolist() == [0.0]


def test_numbers_beyond_the_bins_are_the_smallest_and_the_largest():
    sketch = PairSketch()
    sketch.add(torch.tensor([0.0, 1e-30, 1.0]), torch.tensor([1.0, 2.0, 4.0]))
    sketch.add(torch.tensor([1e30]), torch.tensor([8.0]))
    assert int(sketch.counts.sum()) == 4
    found = sketch.second_quantiles(torch.tensor([0.5, -1.0]), torch.tensor([0.25, 0.25]))
    assert ((found > 4.0) & (found < 8.8)).all()
    assert sketch.second_quantiles(torch.tensor([-1.0]), torch.tensor([0.0])).isfinite().all()


def test_what_is_0_at_first_says_nothing_of_what_comes():
    sketch = PairSketch()
    sketch.add(torch.zeros(10), torch.zeros(10))
    sketch.add(torch.linspace(0, 1, 1000), torch.linspace(0, 2, 1000))
    assert sketch.second_quantiles(torch.tensor([0.5]), torch.tensor([0.25])).item() == pytest.approx(1.495, abs=0.02)


def test_of_an_empty_sketch_nothing_follows():
    with pytest.raises(ValueError, match="the sketch is empty"):
        PairSketch().second_quantiles(torch.tensor([0.5]), torch.tensor([0.25]))


def test_active_sets_follow_what_was_counted():
    looks = Looks(2)
    first = torch.linspace(0, 1, 10_001)
    second = 1 - first
    looks.add(first, second)
    active = looks.active((0.5, 0.8), first, second)
    assert active.double().mean() == pytest.approx(0.2, abs=0.005)
    assert first[active].min() > 0.49
    assert second[active].min() > 0.29
    assert looks.active((0.0, 0.0), first, second).all()


@pytest.mark.parametrize("name", ["m-countdown", "cats"])
@pytest.mark.parametrize("weighting", ["none", "rms", "column-norm"])
def test_what_both_looks_leave_is_what_was_asked_for(model, tokenizer, text, name, weighting):
    config = method(name, weighting=weighting, sparsity=0.6, second_look=LOOK)
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=4096, window=64, progress=False)
    for sparsity in (0.2, 0.5, 0.6, 0.8):
        aimed = profile.with_settings(sparsity=sparsity)
        countdown.sparsify_(model, aimed, apply_to="all")
        with torch.inference_mode():
            for window in countdown.text.windows(tokenizer, text, count=8, length=64):
                model(window[None], use_cache=False)
        found = status(model)
        countdown.restore_(model)
        first = max(0.0, 1 - (1 + LOOK) * (1 - sparsity))
        looks = torch.tensor([site.looks for site in found])
        assert (1 - looks.mean(0)).tolist() == pytest.approx([first, 2 * sparsity - first], abs=0.03)
        realised = sum(site.realised_sparsity for site in found) / len(found)
        assert realised == pytest.approx(sparsity, abs=0.03)
        read = sum(site.weights_read for site in found) / len(found)
        assert read == pytest.approx((1 + float(looks.mean(0).sum())) / 3)


@pytest.mark.parametrize("weighting", ["none", "rms", "column-norm"])
def test_what_is_left_has_large_coefficients_by_their_weights(tokenizer, text, weighting):
    model = llama()
    config = method("m-countdown", weighting=weighting, sparsity=0.6, second_look=LOOK)
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=1024, window=64, progress=False)
    countdown.sparsify_(model, profile)
    module = model.model.layers[1].mlp
    x = numbers(9, 24, seed=5)
    with torch.inference_mode():
        a, u = (factor.double() for factor in module.site.sum.project(x))
        active = module.active(x)
    down = module.down_proj.weight.detach().double()
    rms = module.per_term[0].double()
    by_norm = down.norm(dim=0) if weighting == "column-norm" else torch.ones(down.shape[1]).double()
    # One threshold for the whole layer once coefficients are weighted, whatever the neuron.
    second = module.per_term[1].double() * by_norm
    assert second.tolist() == pytest.approx([float(second[0])] * len(second), rel=1e-5)
    assert torch.equal(active, (u.abs() > rms) & ((a * u).abs() * by_norm > second[0]))
    assert 0.1 < active.double().mean() < 0.6


@torch.no_grad()
def test_dense_at_sparsity_0_and_the_same_when_saved(tokenizer, text, tmp_path):
    model = llama()
    ids = torch.tensor([list(b"a second look at ten neurons")])
    expected = model(ids).logits
    config = method("cats", weighting="column-norm", sparsity=0.7, second_look=LOOK)
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=1024, window=64, progress=False)
    again = Profile.load(profile.save(tmp_path / "p"))
    assert again.entries[0].method == config
    texts = []
    for one in (profile, again):
        countdown.sparsify_(model, one.with_settings(sparsity=0.5), apply_to="all")
        texts.append(model(ids).logits)
        countdown.restore_(model)
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], expected)
    countdown.sparsify_(model, again.with_settings(sparsity=0.0), apply_to="all")
    assert torch.equal(model(ids).logits, expected)


def test_a_profile_serves_one_second_look_and_threshold_decisions(tokenizer, text):
    config = method("m-countdown", second_look=LOOK)
    profile = countdown.calibrate(llama(), tokenizer, text, config, tokens=1024, window=64, progress=False)
    with pytest.raises(ConfigError, match="second_look is part of a profile's calibration; calibrate again"):
        profile.with_settings(second_look=0.1)
    with pytest.raises(ConfigError, match="'topk' of m-countdown does not go with a second look"):
        profile.with_settings(decision="topk")


@pytest.mark.parametrize("settings", [{"compensate": "affine"}, {"allocation": "global"}], ids=str)
def test_a_second_look_beside_other_settings(tokenizer, text, settings):
    model = llama()
    config = method("m-countdown", weighting="rms", sparsity=0.6, second_look=LOOK, **settings)
    profile = countdown.calibrate(model, tokenizer, text, config, tokens=4096, window=64, progress=False)
    countdown.sparsify_(model, profile, apply_to="all")
    with torch.inference_mode():
        for window in countdown.text.windows(tokenizer, text, count=8, length=64):
            model(window[None], use_cache=False)
    found = status(model)
    assert sum(site.realised_sparsity for site in found) / len(found) == pytest.approx(0.6, abs=0.03)
    assert all(site.looks[0] > site.looks[1] for site in found)
    assert {bool(site.compensation) for site in found} == {"compensate" in settings}
