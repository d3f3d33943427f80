"""Allocations for linears: slopes and errors are those of the model, groups stay together, budgets are met."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import countdown
from countdown.artifacts import ERRORS, GROUP
from countdown.calibration.calibrate import calibrate
from countdown.calibration.passes import Assignment, Run
from countdown.calibration.passes.sketches import sketch_sparse
from countdown.calibration.passes.slopes import chord, kl_curvatures, kl_slopes
from countdown.errors import ProfileError
from countdown.methods import method
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe, RecipeEntry
from countdown.sites import find_sites
from countdown.text import windows
from tiny import llama

TOKENS = 2048
K = 0.4


def sparsities(model, profile, sparsity=None):
    """The target of every module by name, and their mean by weights."""
    countdown.sparsify_(model, profile, sparsity=sparsity)
    sites = countdown.status(model)
    countdown.restore_(model)
    mean = sum(site.target_sparsity * site.size for site in sites) / sum(site.size for site in sites)
    return {site.name: site.target_sparsity for site in sites}, mean


class Masked:
    """A model whose linears drop what is small in hooks of their own, on one sequence; thresholds are from it dense."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids
        self.sites = {site.name: site.module for site in find_sites(model, ["linear"])}
        self.inputs, self.masks, self.bands = {}, {}, {}
        self.dense = self._logits(self.inputs.setdefault, lambda *_: None)

    def threshold(self, name, sparsity):
        return float(self.inputs[name].abs().float().flatten().quantile(sparsity))

    def kl(self, moved=None, epsilon=0.0):
        """KL(dense ‖ sparse) by token; the output of one linear moved by this much of what lies in its band."""

        def move(name, output):
            return output - epsilon * self.bands[name] if name == moved else None

        p, q = (F.log_softmax(one, dim=-1) for one in (self.dense, self._logits(self._drop, move)))
        return float(F.kl_div(q, p, reduction="sum", log_target=True)) / len(self.ids)

    def _drop(self, name, x):
        size, (low, high) = x.abs().float(), (self.threshold(name, k) for k in chord(K))
        # As they are where nothing is moved: a derivative does not see a term change sides.
        mask = self.masks.setdefault(name, size > self.threshold(name, K))
        band = torch.where((size > low) & (size <= high), x, 0)
        self.bands.setdefault(name, (band @ self.sites[name].weight.T).detach())
        return torch.where(mask, x, 0)

    def _logits(self, before, after):
        hooks = []
        for name, module in self.sites.items():
            hooks.append(module.register_forward_pre_hook(lambda _, x, name=name: before(name, x[0])))
            hooks.append(module.register_forward_hook(lambda _, __, y, name=name: after(name, y)))
        with torch.no_grad():
            logits = self.model(self.ids[None]).logits
        for hook in hooks:
            hook.remove()
        return logits


def test_slopes_are_derivatives_of_the_models_kl(tokenizer, text):
    model = llama(torch.float64)
    ids = windows(tokenizer, text, count=1, length=64)[0]
    masked = Masked(model, ids)
    masked.kl()
    assigned = [Assignment(site, method("teal", sparsity=K)) for site in find_sites(model, ["linear"])]
    slopes = kl_slopes(model, assigned, [ids], dict.fromkeys(masked.sites, K), masked.threshold)
    low, high = chord(K)
    # Two layers' projections: grouped keys and values are among them.
    for name in list(masked.sites)[:14:2]:
        step = 0.05  # norms compute in float32, so a small one would drown
        expected = (masked.kl(name, step) - masked.kl(name, -step)) / (2 * step) / (high - low)
        assert slopes[name] == pytest.approx(expected, rel=1e-2, abs=1e-8), name


@pytest.mark.parametrize("name", ["1.self_attn.v_proj", "0.mlp.down_proj", "2.mlp.gate_proj"])
def test_curvatures_are_the_kl_that_the_errors_of_one_site_make(name, tokenizer, text):
    model = llama(torch.float64)
    sequences = list(windows(tokenizer, text, count=16, length=64))
    site = next(one for one in find_sites(model, ["linear"]) if one.name.endswith(name))
    threshold = float(torch.cat([Masked(model, ids).inputs[site.name] for ids in sequences]).abs().quantile(K))
    (found,) = kl_curvatures(
        model, [Assignment(site, method("teal", sparsity=0.0))], sequences, {site.name: 0.0},
        lambda _, sparsity: threshold if sparsity else -1.0,
    ).values()  # fmt: skip
    expected = 0.0
    for ids in sequences:
        with torch.no_grad():
            dense = model(ids[None]).logits
            hook = site.module.register_forward_pre_hook(lambda _, x: torch.where(x[0].abs() > threshold, x[0], 0))
            sparse = model(ids[None]).logits
            hook.remove()
        p, q = (F.log_softmax(one, dim=-1) for one in (dense, sparse))
        expected += float(F.kl_div(q, p, reduction="sum", log_target=True)) / len(ids) / len(sequences)
    # One token is drawn for each position, and effects of several positions on one are added as if independent.
    assert found == pytest.approx(expected, rel=0.5)


def test_the_error_of_a_linear_is_what_its_dropped_channels_add(tokenizer, text):
    model = llama()
    sequences = [row[:64] for row in windows(tokenizer, text, count=4)]
    sites = find_sites(model, ["linear"])
    owners = {site.name: 0 for site in sites}
    config = method("teal", sparsity=0.0)
    run = Run(model, sequences, sequences, Recipe.of(config), [Assignment(s, config) for s in sites], owners, False)
    levels = iter([dict.fromkeys(owners, 0.0)] * len(sequences))
    sketches = sketch_sparse(run, sequences, levels, losses=True)
    site = next(site for site in sites if site.name.endswith("1.self_attn.v_proj"))
    inputs = []
    hook = site.module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
    with torch.no_grad():
        for sequence in sequences:
            model(sequence[None])
    hook.remove()
    x = torch.cat(inputs).double()
    lost = (x.square() * site.module.weight.detach().double().square().sum(dim=0)).flatten()
    order = x.abs().flatten().argsort()
    for share in (0.1, 0.5, 0.9):
        expected = float(lost[order[: int(share * len(order))]].sum()) / len(x)
        found = float(sketches[site.name].errors(site.terms)[int(share * 1000)])
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["teal", "wina"])
def test_a_global_budget_over_linears_is_met_and_kept_in_the_profile(name, tokenizer, text, tmp_path):
    model = llama()
    config = method(name, sparsity=0.5, allocation="global")
    profile = calibrate(model, tokenizer, text, config, tokens=TOKENS, progress=False)
    profile.save(tmp_path / "p")
    for sparsity in (None, 0.3):
        found, mean = sparsities(model, Profile.load(tmp_path / "p"), sparsity)
        assert mean == pytest.approx(sparsity or 0.5, abs=2e-3)
        assert max(found.values()) - min(found.values()) > 0.05
    countdown.sparsify_(model, profile, apply_to="all")
    with torch.no_grad():
        model(windows(tokenizer, text, count=4))
    assert all(s.realised_sparsity == pytest.approx(s.target_sparsity, abs=0.06) for s in countdown.status(model))


def test_linears_that_share_active_sets_share_their_sparsity(tokenizer, text):
    model = llama()
    config = method("wina", sparsity=0.5, allocation="global")
    profile = calibrate(model, tokenizer, text, config, tokens=TOKENS, progress=False)
    for sparsity in (0.5, 0.25, 0.7):
        found, _ = sparsities(model, profile, sparsity)
        for layer in range(3):
            prefix = f"model.layers.{layer}"
            assert len({found[f"{prefix}.self_attn.{name}_proj"] for name in "qkv"}) == 1
            assert len({found[f"{prefix}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    numbers = {name: float(site[GROUP.name]) for name, site in profile.entries[0].sites.items()}
    assert len(set(numbers.values())) == 4 * 3
    countdown.sparsify_(model, profile.with_settings(sparsity=0.3))
    attention, x = model.model.layers[1].self_attn, torch.randn(3, model.config.hidden_size)
    assert torch.equal(attention.q_proj.active(x), attention.v_proj.active(x))


def test_a_subset_of_the_linears_has_a_budget_of_its_own(tokenizer, text):
    model = llama()
    entries = (RecipeEntry(method("teal", sparsity=0.4, allocation="global"), "*.self_attn.*"),)
    profile = calibrate(model, tokenizer, text, Recipe(entries), tokens=TOKENS, progress=False)
    found, mean = sparsities(model, profile)
    assert len(found) == 4 * 3
    assert all(".self_attn." in name for name in found)
    assert mean == pytest.approx(0.4, abs=2e-3)


def test_a_profile_without_errors_is_not_allocated_globally(tokenizer, text):
    profile = calibrate(llama(), tokenizer, text, method("teal"), tokens=512, progress=False)
    assert all(ERRORS.name not in site for site in profile.entries[0].sites.values())
    with pytest.raises(ProfileError, match=r"not calibrated for allocation 'global'; calibrate again with it\.$"):
        countdown.sparsify_(llama(), profile.with_settings(allocation="global"))
