"""Greedy allocation: the path is greedy, every layer meets the target, and its output loses less than under uniform."""

from __future__ import annotations

import pytest
import torch

import countdown
from countdown.artifacts import PATH
from countdown.calibration.calibrate import calibrate, calibration_sequences
from countdown.calibration.passes.greedy import climb, paths
from countdown.errors import ConfigError, CountdownError, ProfileError
from countdown.methods import method
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe, RecipeEntry
from tiny import llama

TOKENS = 2048
LAYERS = 3


def layer_of(name):
    return int(name.split(".")[2])


def targets(model, profile, sparsity=None):
    """The target of every module, and of every layer the mean by weights."""
    countdown.sparsify_(model, profile, sparsity=sparsity)
    sites = countdown.status(model)
    countdown.restore_(model)
    means = {}
    for layer in {layer_of(site.name) for site in sites}:
        inside = [site for site in sites if layer_of(site.name) == layer]
        means[layer] = sum(site.target_sparsity * site.size for site in inside) / sum(site.size for site in inside)
    return {site.name: site.target_sparsity for site in sites}, means


def convex(levels):
    return sum(scale * level**power for scale, power, level in zip((3, 1, 0.2), (2, 3, 2), levels, strict=True))


def test_a_path_is_that_of_looking_at_every_member_before_every_step():
    sizes, steps = (4.0, 1.0, 2.0), 10
    levels, expected = [0.0] * 3, [[0.0] * 3]
    while any(level < 0.89 for level in levels):
        raised = [[round(k + 0.1 * (j == i), 9) for j, k in enumerate(levels)] for i in range(3)]
        rates = [(convex(raised[i]) - convex(levels)) / sizes[i] if levels[i] < 0.89 else torch.inf for i in range(3)]
        levels = raised[rates.index(min(rates))]
        expected.append(levels)
    found = climb(sizes, convex, steps)
    assert [[round(k, 9) for k in point] for point in found] == expected


def test_few_looks_are_taken():
    looks = []
    climb([1.0] * 7, lambda levels: looks.append(levels) or sum(k**2 for k in levels), 10)
    # Of 7 before each of 7 · 9 steps; fewer where members differ.
    assert len(looks) < 7 * 7 * 9 / 2


def test_what_is_smaller_saves_less_so_it_steps_later():
    # Grouped keys and values: a third of the weights for the same error.
    first = climb([3.0, 1.0], lambda levels: sum(k**2 for k in levels), 4)[1:4]
    assert first == [[0.25, 0.0], [0.5, 0.0], [0.5, 0.25]]


def test_members_alone_have_the_sparsity_of_the_whole():
    def never(levels):
        raise AssertionError("there is nothing to compare")

    (path,) = paths([5.0], climb([5.0], never, 10))
    torch.testing.assert_close(path, torch.arange(1000) / 1000)


def test_the_whole_meets_every_sparsity_of_its_path():
    sizes = torch.tensor([4.0, 1.0, 2.0])
    found = torch.stack(paths(sizes.tolist(), climb(sizes.tolist(), convex, 10)))
    torch.testing.assert_close((sizes / 7) @ found, torch.arange(1000) / 1000, rtol=0, atol=1e-5)
    assert found[:, 0].tolist() == [0, 0, 0]
    assert (found.diff(dim=1) >= 0).all()
    assert found.max() < 1


@pytest.fixture(scope="module")
def made(tokenizer, text):
    """Profiles of a model whose grouped keys and values are smaller than its queries."""
    return {
        name: calibrate(
            llama(), tokenizer, text, method(name, sparsity=0.5, allocation="greedy"), tokens=TOKENS, progress=False
        )
        for name in ("teal", "wina")
    }


@pytest.mark.parametrize("name", ["teal", "wina"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_every_layer_meets_the_target(name, sparsity, made, tmp_path):
    made[name].save(tmp_path / "p")
    found, means = targets(llama(), Profile.load(tmp_path / "p"), sparsity)
    assert means == pytest.approx(dict.fromkeys(range(LAYERS), sparsity), abs=1e-3)
    assert max(found.values()) - min(found.values()) > 0.1


def test_linears_that_share_active_sets_step_together(made):
    found, _ = targets(llama(), made["wina"], 0.4)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        assert len({found[f"{prefix}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({found[f"{prefix}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    apart, _ = targets(llama(), made["teal"], 0.4)
    assert len({apart[f"model.layers.{layer}.self_attn.{name}_proj"] for layer in range(LAYERS) for name in "qkv"}) > 3


def test_a_layers_output_loses_less_than_under_uniform(made, tokenizer, text):
    model = llama()
    ids = calibration_sequences(tokenizer, text, TOKENS)[0]
    inputs = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, given, named, out, i=i: inputs.update({i: (given, named, out)}), with_kwargs=True
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()

    def lost(profile):
        countdown.sparsify_(model, profile, apply_to="all")
        with torch.no_grad(), countdown.phases(model, torch.zeros(len(ids), dtype=torch.uint8)):
            found = [
                float((layer(*inputs[i][0], **inputs[i][1]) - inputs[i][2]).square().sum())
                for i, layer in enumerate(model.model.layers)
            ]
        countdown.restore_(model)
        return torch.tensor(found)

    for sparsity in (0.3, 0.5):
        greedy, uniform = (
            lost(made["teal"].with_settings(sparsity=sparsity, allocation=name)) for name in ("greedy", "uniform")
        )
        assert (greedy < uniform).all()


def test_what_is_left_out_stays_dense(tokenizer, text):
    entries = (
        RecipeEntry(method("m-countdown"), "*.0.mlp"),
        RecipeEntry(method("teal", sparsity=0.3, allocation="greedy"), "*.[01].self_attn.*"),
        RecipeEntry(method("teal", sparsity=0.6, allocation="greedy"), "*.1.mlp.*"),
    )
    model = llama()
    profile = calibrate(model, tokenizer, text, Recipe(entries), tokens=TOKENS, progress=False)
    found, _ = targets(model, profile)
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if hasattr(module, "weight")}

    def mean(part):
        names = [name for name in found if part in name]
        return sum(found[name] * sizes[name] for name in names) / sum(sizes[name] for name in names)

    assert len(found) == 1 + 8 + 3
    assert [mean("0.self_attn."), mean("1.self_attn."), mean("1.mlp.")] == pytest.approx([0.3, 0.3, 0.6], abs=1e-3)


def test_quantiles_need_no_symmetry(monkeypatch, tokenizer, text):
    # Inputs of the FFN far from 0, all of one sign.
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.register_forward_hook(lambda *arguments: arguments[-1].abs() + 3)
    active = []
    import countdown.calibration.passes.greedy as greedy

    observe = greedy._Search.observe

    def watched(search, site, *given):
        found = observe(search, site, *given)
        if found is not None and site.name.endswith("1.mlp.up_proj"):
            active.append((search._levels[site.name], 1 - float(found.double().mean())))
        return found

    monkeypatch.setattr(greedy._Search, "observe", watched)
    config = method("teal", sparsity=0.5, allocation="greedy")
    calibrate(model, tokenizer, text, config, tokens=512, progress=False)
    assert active
    assert all(dropped == pytest.approx(level, abs=5e-3) for level, dropped in active)


def test_the_model_is_left_as_it_was(tokenizer, text, monkeypatch):
    model = llama()
    before, hooks = dict(model.named_modules()), [len(m._forward_hooks) for m in model.modules()]

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("countdown.calibration.passes.greedy.climb", fail)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, text, method("teal", allocation="greedy"), tokens=512, progress=False)
    assert all(dict(model.named_modules())[name] is module for name, module in before.items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_progress_is_said(tokenizer, text, capsys):
    calibrate(llama(), tokenizer, text, method("teal", allocation="greedy"), tokens=512)
    assert "calibrating (1 of 2), greedy allocation by layer: 3 steps\n" in capsys.readouterr().err


def test_bad_input(tokenizer, text, made):
    with pytest.raises(ConfigError, match=r"^allocation of cats is 'greedy', expected one of: global, uniform\.$"):
        method("cats", allocation="greedy")
    with pytest.raises(ConfigError, match=r"^sparsity of teal is 1\.0, expected 0 ≤ sparsity < 1 "):
        made["teal"].with_settings(sparsity=1.0)
    plain = calibrate(llama(), tokenizer, text, method("teal"), tokens=512, progress=False)
    with pytest.raises(ProfileError, match=r"not calibrated for allocation 'greedy'; calibrate again with it\.$"):
        countdown.sparsify_(llama(), plain.with_settings(allocation="greedy"))
    beyond = Recipe((RecipeEntry(method("teal", allocation="greedy"), "*.layers.7.*"),))
    with pytest.raises(ConfigError, match=r"^pattern '\*\.layers\.7\.\*' takes no module of the model: its method"):
        calibrate(llama(), tokenizer, text, beyond, tokens=512, progress=False)
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(CountdownError, match="not finite"):
        calibrate(broken, tokenizer, text, method("teal", allocation="greedy"), tokens=512, progress=False)


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda path: path[:10], "have shape"),
        (lambda path: path.flip(0), "begin elsewhere"),
        (lambda path: path + (path == path.max()), "reach 1"),
    ],
)
def test_a_path_that_is_none_is_refused(spoil, problem, made, tmp_path):
    (entry,) = made["teal"].entries
    name, artifacts = next(iter(entry.sites.items()))
    artifacts = {**artifacts, PATH.name: spoil(artifacts[PATH.name]).clone()}
    entry = type(entry)(entry.pattern, entry.method, {**entry.sites, name: artifacts})
    profile = type(made["teal"])(**{**vars(made["teal"]), "entries": [entry]})
    profile.save(tmp_path / "p")
    with pytest.raises(ProfileError, match=rf"damaged: .*path of {name} {problem}"):
        Profile.load(tmp_path / "p")
