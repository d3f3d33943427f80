"""Comparing from end to end on a small random model: what is measured, kept, refused and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import countdown
from countdown.benchmark import arm
from countdown.benchmark.timing import Bandwidth, Rounds
from countdown.comparison import compare as module
from countdown.comparison import effort, grid, markdown, quantised, session
from countdown.comparison.cache import Cache
from countdown.comparison.compare import compare
from countdown.comparison.comparison import CURVE, Cell, Comparison, Speed
from countdown.comparison.session import pieces
from countdown.errors import AccidentError, ConfigError, TextError, UnsupportedModelError
from countdown.profiles.profile import Profile
from countdown.profiles.recipe import Recipe
from tiny import byte_tokenizer, llama

FAST = {"windows": 4, "tokens": 1024, "progress": False}
ONE = {"methods": ["m-countdown:weighting=rms"], "sparsities": [0.5, 0.8]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Llama whose rows int4 takes, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama(hidden_size=64, intermediate_size=96, head_dim=32, num_hidden_layers=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


real = arm.measure


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Do little, and time nothing: every token takes 10 µs in the dense model and 9.5 µs in others."""

    def measure(arms, **_):
        times, rates = real(arms, rounds=Rounds(1, 1))
        for name, found in times.items():
            took = {"token": 9.5 if name == "configuration" else 10.0}
            times[name] = {what: 6 * [took.get(what, 1.0)] for what in found}
        return times, rates

    patch.setattr(session, "measure", measure)
    patch.setattr(session, "bandwidth", lambda _: Bandwidth(1e9, 1e9, 1e9))
    patch.setattr(session, "CONTEXT", 16)
    patch.setattr(session, "NEW_TOKENS", 4)
    patch.setattr(session, "SAMPLE_TOKENS", 8)


@pytest.fixture(scope="module")
def warm(tmp_path_factory, folder, text) -> Path:
    """A cache that holds the comparison of `ONE` with speed."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "text.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTDOWN_CACHE", str(cache))
        shorten(patch)
        compare(str(folder), **ONE, **FAST, text=str(cache / "text.txt"))
    return cache


@pytest.fixture
def cache(warm, tmp_path, monkeypatch) -> Path:
    """A copy of the warm cache, to use and spoil."""
    copy = tmp_path / "cache"
    shutil.copytree(warm, copy)
    monkeypatch.setenv("COUNTDOWN_CACHE", str(copy))
    shorten(monkeypatch)
    return copy


@pytest.fixture
def run(folder, cache):
    """Compare as in the cache, unless told otherwise; `run.said` is what was done."""

    def run(**more):
        run.said = []
        settings = {**ONE, **FAST, "text": str(cache / "text.txt"), "say": run.said.append} | more
        return compare(str(folder), **settings)

    return run


def measured(said: list[str]) -> list[str]:
    lines = [line.removeprefix("measuring ") for line in said if line.startswith("measuring ") and "band" not in line]
    return [line.partition(" (")[0] for line in lines]


def test_what_is_measured(run):
    found = run()
    assert [cell.label for cell in found.cells] == [
        "dense", "m-countdown × rms at 0.5", "m-countdown × rms at 0.8", "int8", "int4",
    ]  # fmt: skip
    dense, half, most, int8, int4 = found.cells
    assert not any(cell.error for cell in found.cells)
    assert (dense.quality.loss, dense.quality.kl, dense.quality.top1) == (0.0, 0.0, 1.0)
    assert dense.quality.loss_interval == (0.0, 0.0)
    assert (dense.weights_read, dense.site_weights_read, dense.speed.speedup) == (1.0, 1.0, 1.0)
    assert 0 < half.quality.kl < most.quality.kl
    assert half.quality.realised_sparsity == pytest.approx(0.5, abs=0.1)
    # One projection whole, of the two others what is active.
    assert half.site_weights_read == pytest.approx(1 - 2 / 3 * half.quality.realised_sparsity)
    assert most.weights_read < half.weights_read < 1
    assert int4.weights_read < int8.weights_read < 0.5
    assert int4.settings["scales"] == 32
    for cell in found.cells:
        assert cell.quality.tokens == 4 * 511
        assert len(cell.quality.window_nll) == 4
        assert len(cell.sample.tokens) == len(cell.sample.pieces) == 8
        assert cell.speed.tokens_per_s > 0
        assert cell.quality.loss_interval[0] <= cell.quality.loss <= cell.quality.loss_interval[1]
    assert set(dense.speed.split_us) == set(half.speed.split_us) == {"ffn", "attention_linears", "head", "rest"}


def test_methods_on_one_budget_read_less_of_the_whole_token(run):
    found = run(methods=["d-proxy", "d-proxy+wina"], sparsities=[0.5], speed=False, quantised=False)
    one, both = found.cells[1:]
    assert both.label == "d-proxy, 4 bits; teal × shared-norm; one budget, global at 0.5"
    assert both.error is None
    assert len(both.quality.layers) > len(one.quality.layers)
    assert both.weights_read < one.weights_read
    assert grid.Configuration.of_cell(both).recipe == Recipe.named("d-proxy+wina", sparsity=0.5)


def test_it_says_how_far_along_it_is_and_what_it_found(run):
    found = []
    run(sparsities=[0.5, 0.6, 0.7], speed=False, on_cell=found.append)
    first, last = [line for line in run.said if line.startswith("measuring")]
    assert first == "measuring m-countdown × rms at 0.6 (1 of 2)"
    assert last.startswith("measuring m-countdown × rms at 0.7 (2 of 2, about ")
    # What is found in the cache is nothing new.
    assert [cell.label for cell in found] == ["m-countdown × rms at 0.6", "m-countdown × rms at 0.7"]


def test_speeds_have_intervals_and_a_dense_value_beside(run):
    dense, *others = run().cells
    assert dense.speed.interval == (1.0, 1.0)
    for cell in others:
        low, high = cell.speed.interval
        assert (low, cell.speed.speedup, high) == pytest.approx((10 / 9.5,) * 3)
        record = cell.record()
        assert record["dense_tokens_per_s"] * cell.speed.speedup == pytest.approx(cell.speed.tokens_per_s)
        assert (record["speedup_low"], record["speedup_high"]) == (low, high)


def test_a_speed_up_that_cannot_be_is_measured_again(run, monkeypatch):
    steady = session.measure

    def beside_a_stalled_one(arms, **more):
        times, rates = steady(arms, **more)
        if "configuration" in times:
            times["dense"] = {"token": [20 * one for one in times["configuration"]["token"]]}
        return times, rates

    monkeypatch.setattr(session, "measure", beside_a_stalled_one)
    settings = {"sparsities": [0.6], "quantised": False, "max_loss": 1000.0}
    run(**settings)
    found = run(**settings)  # its speed alone, by the bytes that are known
    assert "its bytes allow" in found.cells[1].doubt
    assert found.recommendation.label == "dense"
    assert found.meta["caveats"][0].startswith("The speed-up of m-countdown × rms at 0.6 is unreliable")
    monkeypatch.setattr(session, "measure", steady)
    monkeypatch.setattr(session, "measure_quality", None)  # that is known
    assert run(**settings).cells[1].doubt is None
    assert measured(run.said) == ["m-countdown × rms at 0.6"]


def test_usually_predictions_are_compared_where_they_are_fitted():
    found = grid.configurations(None, None, effort.USUAL)
    predicting = [one for one in found if "affine" in one.label]
    assert {one.recipe.entries[0].method.name for one in predicting} == {"d-proxy", "m-countdown", "cats"}
    # Below it would be the method without.
    assert {one.sparsity for one in predicting} == {0.5, 0.7, 0.8}
    assert 0.3 in {one.sparsity for one in found}
    assert not any("affine" in one.label for one in grid.configurations(None, None, effort.QUICK))


def test_what_is_quick_measures_less_and_is_called_rough(run, cache):
    found = run(quick=True, methods=["cats"], sparsities=None, windows=None, tokens=1024, speed=False, quantised=False)
    assert [cell.label for cell in found.cells] == ["dense", "cats at 0.5", "cats at 0.7"]
    assert found.rough
    assert found.meta["windows"] == 4
    assert found.meta["caveats"][0].startswith("This comparison is quick, and rough: 4 windows")
    assert found.recommendation.reason.endswith("without --quick) decides, and may recommend another.")
    whole = run(speed=False, quantised=False)
    assert not whole.rough
    assert "rough" not in whole.recommendation.reason
    weighted, more = (grid.configurations(None, [0.5], one) for one in (effort.QUICK, effort.USUAL))
    assert {one.label for one in weighted} < {one.label for one in more}
    assert "d-proxy, 4 bits; teal × shared-norm; one budget, global at 0.5" in {one.label for one in more}


def test_layers_show_what_they_do(run):
    layers = run().cells[1].quality.layers
    assert [layer.name for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for layer in layers:
        assert layer.target == 0.5
        assert 0.2 < layer.recall <= 1
        assert 0 < layer.lost < 0.5
        assert len(layer.activity) == CURVE
        assert layer.activity == sorted(layer.activity, reverse=True)
        assert sum(layer.activity) / CURVE == pytest.approx(1 - layer.realised, abs=0.12)


def test_the_same_numbers_as_evaluate(run, folder, cache):
    cell = run().cell("m-countdown × rms at 0.5")
    tokenizer = byte_tokenizer()
    model = countdown.from_pretrained(str(folder), device="cpu")
    recipe = countdown.method("m-countdown", weighting="rms")
    profile = countdown.calibrate(
        model, tokenizer, countdown.load_text("python-docs", "calibration"), recipe, tokens=1024, progress=False
    )
    countdown.sparsify_(model, profile)
    from countdown.text import windows

    every = windows(tokenizer, (cache / "text.txt").read_text(encoding="utf-8"))
    dealt = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:4]]
    found = countdown.evaluate(model, dealt, progress=False)
    assert cell.quality.perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert cell.quality.loss == pytest.approx(found.perplexity / found.dense_perplexity - 1, rel=1e-3)
    assert cell.quality.kl == pytest.approx(found.kl, rel=1e-3)
    assert cell.quality.realised_sparsity == pytest.approx(found.realised_sparsity)


def test_a_second_run_loads_nothing(run, monkeypatch):
    first = run()
    monkeypatch.setattr(session, "load_model", None)
    monkeypatch.setattr(session, "load_tokenizer", None)
    again = run()
    assert again.cells == first.cells
    assert again.recommendation == first.recommendation
    assert run.said == []


def test_one_more_sparsity_measures_only_that(run, monkeypatch):
    monkeypatch.setattr(session, "calibrate", None)
    found = run(sparsities=[0.5, 0.6, 0.8])
    assert measured(run.said) == ["m-countdown × rms at 0.6"]
    assert not any(cell.error for cell in found.cells)


def test_an_interrupted_comparison_continues(run, monkeypatch):
    real = session.measure_quality

    def interrupted(model, dense, *, label, **more):
        if label == "cats at 0.6":
            raise KeyboardInterrupt
        return real(model, dense, label=label, **more)

    monkeypatch.setattr(session, "measure_quality", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(methods=["cats"], sparsities=[0.5, 0.6, 0.7], speed=False, quantised=False)
    monkeypatch.setattr(session, "measure_quality", real)
    run(methods=["cats"], sparsities=[0.5, 0.6, 0.7], speed=False, quantised=False)
    assert measured(run.said) == ["cats at 0.6", "cats at 0.7"]


def test_fresh_measures_all_again(run):
    run(fresh=True, speed=False)
    assert measured(run.said) == ["dense", "m-countdown × rms at 0.5", "m-countdown × rms at 0.8", "int8", "int4"]


def test_a_damaged_cache_is_measured_again(run, cache):
    first = run(speed=False)
    files = [*(cache / "cells").iterdir(), *(cache / "profiles").glob("*/profile.json")]
    qualities = [file for file in files if '"quality"' in file.read_text()]
    for file in files:
        file.write_text("{")
    for file, content in zip(qualities, ["", "{", "[]", '{"key": 1}', "\x00"], strict=True):
        file.write_text(content)
    again = run(speed=False)
    assert len(measured(run.said)) == 5
    assert [cell.quality for cell in again.cells] == [cell.quality for cell in first.cells]


def test_a_cached_value_of_another_form_is_measured_again(run, cache):
    for file in (cache / "cells").iterdir():
        found = json.loads(file.read_text())
        if found["key"]["part"] == "sample" and found["key"]["configuration"].get("quantised") == "int8":
            file.write_text(json.dumps(found | {"value": {"value": {"sample": {"tokens": []}}}}))
    assert run().cell("int8").sample is not None
    assert measured(run.said) == ["int8"]


@pytest.mark.parametrize("change", [{"windows": 5}, {"seed": 1}, {"tokens": 2048}, {"prompt": "Other?"}])
def test_what_numbers_depend_on_is_in_the_key(run, change):
    run(**change, speed=False, quantised=False)
    assert len(measured(run.said)) == 3


def test_other_weights_are_another_model(run, folder, tmp_path, cache):
    other = tmp_path / "tiny"
    shutil.copytree(folder, other)
    model = countdown.from_pretrained(str(other), device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] += 1
    model.save_pretrained(other)
    said: list[str] = []
    settings = {**ONE, **FAST, "text": str(cache / "text.txt"), "speed": False, "quantised": False}
    compare(str(other), **settings, say=said.append)
    assert len(measured(said)) == 3


def test_one_that_fails_does_not_stop_the_others(run, monkeypatch):
    real = session.measure_quality

    def failing(model, dense, *, label, **more):
        if label == "cats at 0.5":
            raise RuntimeError("out of\nmemory")
        return real(model, dense, label=label, **more)

    monkeypatch.setattr(session, "measure_quality", failing)
    found = run(methods=["cats"], sparsities=[0.5, 0.6], speed=False)
    failed = found.cell("cats at 0.5")
    assert failed.error == "RuntimeError: out of memory"
    assert failed.quality is None
    assert found.cell("cats at 0.6").quality is not None
    assert found.records()[1]["error"] == failed.error
    # It was an accident, so it is tried again.
    monkeypatch.setattr(session, "measure_quality", real)
    assert run(methods=["cats"], sparsities=[0.5, 0.6], speed=False).cell("cats at 0.5").error is None


def test_an_accident_is_no_refusal(run, monkeypatch):
    """What our own code tells in a line may be an accident, too."""

    def failing(*_):
        raise AccidentError("memory ran out")

    settings = {"methods": ["cats"], "sparsities": [0.5], "speed": False, "quantised": False}
    with monkeypatch.context() as patch:
        patch.setattr(session, "sparse_twin", failing)
        assert run(**settings).cell("cats at 0.5").error == "memory ran out"
    assert run(**settings).cell("cats at 0.5").error is None


def test_memory_that_ran_out_is_no_refusal_of_a_scheme(monkeypatch):
    def failing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(quantised._MAKERS, "cpu", failing)
    with pytest.raises(torch.OutOfMemoryError):
        quantised.quantise(llama(), "int8")


def test_what_cannot_be_kept_is_measured_all_the_same(run, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    settings = {"methods": ["cats"], "sparsities": [0.5], "speed": False, "quantised": False}
    with monkeypatch.context() as patch:
        patch.setattr("countdown.profiles.profile.whole_folder", full)
        patch.setattr("countdown.files._replace", full)
        found = run(**settings)
    assert found.cell("cats at 0.5").error is None
    assert sum(line.startswith("not kept for another run: ") for line in run.said) > 1
    assert "No space left on device." in run.said[-1]
    assert run(**settings).cells == found.cells
    assert measured(run.said) == ["cats at 0.5"]


def test_two_comparisons_keep_the_same_profile(cache, llama_model, tokenizer, text):
    """The second finds what the first has put there, whole or damaged."""
    config = countdown.method("cats", sparsity=0.5)
    profile = countdown.calibrate(llama_model, tokenizer, text, config, tokens=512, progress=False)
    kept = Cache(cache)
    for _ in range(2):
        kept.put_profile({"part": "profile"}, profile)
    (folder,) = (cache / "profiles").glob(f"{kept._folder({'part': 'profile'}).name}")
    (folder / "profile.json").unlink()
    assert kept.get_profile({"part": "profile"}) is None
    kept.put_profile({"part": "profile"}, profile)
    assert kept.get_profile({"part": "profile"}).recipe == profile.recipe


def test_a_recipe_that_does_not_fit_is_an_error_in_its_cell(run, tmp_path, monkeypatch):
    (tmp_path / "nowhere.yaml").write_text("- {method: cats, pattern: 'blocks.*'}")
    found = run(methods=[str(tmp_path / "nowhere.yaml"), "cats"], sparsities=[0.5], quantised=False, speed=False)
    assert "takes no module" in found.cell("nowhere at 0.5").error
    assert found.cell("cats at 0.5").quality is not None
    # It would fail again, so nothing is loaded to see it.
    monkeypatch.setattr(session, "load_model", None)
    run(methods=[str(tmp_path / "nowhere.yaml"), "cats"], sparsities=[0.5], quantised=False, speed=False)


def test_a_dense_model_that_fails_fails_all(run, monkeypatch):
    monkeypatch.setattr(session, "measure_quality", lambda *_, **__: 1 / 0)
    with pytest.raises(countdown.CountdownError, match="the dense model cannot be measured: ZeroDivisionError"):
        run(windows=5)


def test_what_the_loop_refuses_has_no_speed_and_is_said(run, monkeypatch):
    def refusing(*_, **__):
        raise UnsupportedModelError("a sliding window")

    monkeypatch.setattr(session, "Arm", refusing)
    monkeypatch.setattr(session, "NEW_TOKENS", 5)  # other speeds than those in the cache
    found = run(quantised=False)
    assert all(cell.speed is None and cell.error is None for cell in found.cells)
    assert found.meta["caveats"] == ["No speed was measured of any configuration: a sliding window"]
    assert found.meta["bandwidth"] is None
    assert found.recommendation is not None


def test_without_torchao_the_rest_goes_on(run, monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    found = run(speed=False)
    assert {cell.kind for cell in found.cells} == {"dense", "sparse"}
    assert any("torchao is missing" in caveat for caveat in found.meta["caveats"])


def test_a_speed_up_that_cannot_be_is_a_caveat():
    impossible = Speed(1500.0, 14.38, 100.0, interval=(13.0, 16.0))
    (caveat,) = module._doubts([Cell("cats at 0.5", "sparse", {}, 0.5, weights_read=0.8, speed=impossible)])
    assert caveat.startswith("The speed-up of cats at 0.5 is unreliable, and it is not recommended: 14.38 times dense")


def test_where_the_machine_drifts_it_is_said():
    cells = [
        Cell(str(speed), "sparse", {}, 0.5, speed=Speed(speed, ratio, 100.0))
        for speed, ratio in ((150.0, 1.5), (204.0, 2.0))
    ]
    assert module._drift(cells) == []
    drifted = [*cells, Cell("late", "sparse", {}, 0.5, speed=Speed(120.0, 1.5, 100.0))]
    assert "Dense ran at 80.0 to 102.0 tokens/s" in module._drift(drifted)[0]


def test_sparse_linears_are_measured_as_well(run):
    cell = run(methods=["teal"], sparsities=[0.5], quantised=False).cells[1]
    assert cell.error is None
    assert 0 < cell.site_weights_read < 0.8
    assert cell.weights_read < 1
    assert 0.5 < cell.quality.layers[0].recall <= 1
    assert cell.speed.split_us == {}


def test_the_recommendation_is_confirmed_on_other_windows(run):
    # The largest gain there is: whatever it loses is allowed.
    advice = run(speed=False, max_loss=1000.0).recommendation
    assert advice.label == "int4"
    assert advice.interval[0] < advice.expected_loss < advice.interval[1]
    assert advice.confirmed == (advice.interval[0] <= advice.confirmed_loss <= advice.interval[1])
    assert advice.confirmed_loss != advice.expected_loss


def test_no_windows_left_to_confirm_on(run, tmp_path, text):
    (tmp_path / "short.txt").write_text(text[: 4 * 512 + 100], encoding="utf-8")
    advice = run(speed=False, max_loss=1000.0, text=str(tmp_path / "short.txt")).recommendation
    assert (advice.confirmed_loss, advice.confirmed) == (None, None)
    assert advice.interval[0] < advice.interval[1]


def test_the_folder_holds_all_of_it(run, tmp_path, folder):
    found = run(speed=False, quantised=False, max_loss=1000.0, output=tmp_path / "out")
    assert Comparison.load(tmp_path / "out") == found
    assert (tmp_path / "out" / "comparison.csv").read_text(encoding="utf-8").count("\n") == 4
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8") == markdown.render(found)
    profile = Profile.load(tmp_path / "out" / "profile")
    assert found.recommendation.label == "m-countdown × rms at 0.8"
    assert profile.entries[0].method.sparsity == 0.8
    countdown.sparsify_(countdown.from_pretrained(str(folder), device="cpu"), profile)


def test_a_folder_is_extended(run, tmp_path):
    first = run(speed=False, output=tmp_path / "out")
    found = run(speed=False, sparsities=[0.6], output=tmp_path / "out")
    assert measured(run.said) == ["m-countdown × rms at 0.6"]
    assert [cell.label for cell in found.cells] == [
        "dense", "m-countdown × rms at 0.5", "m-countdown × rms at 0.6", "m-countdown × rms at 0.8", "int8", "int4",
    ]  # fmt: skip
    assert {cell.label: cell for cell in found.cells}.items() >= {cell.label: cell for cell in first.cells}.items()


def test_the_seconds_in_a_comparison_are_called_those_of_its_last_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=iter([0.0, 100.0, 200.0, 207.0]).__next__))
    assert run(speed=False, output=tmp_path / "out").meta["this_run_took_s"] == 100
    meta = run(speed=False, sparsities=[0.6], output=tmp_path / "out").meta
    assert meta["this_run_took_s"] == 7
    assert "took_s" not in meta


def test_a_folder_of_another_comparison_is_refused_before_anything_loads(run, tmp_path, monkeypatch):
    run(speed=False, output=tmp_path / "out")
    monkeypatch.setattr(session, "load_model", None)
    with pytest.raises(ConfigError, match=r"other windows \(4, not 5\).*overwrite=True\.$"):
        run(windows=5, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="other text "):
        run(text="python-docs", output=tmp_path / "out")
    (tmp_path / "out" / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is damaged, or no comparison.*make it again"):
        run(output=tmp_path / "out")


def test_overwriting_replaces(run, tmp_path):
    run(speed=False, output=tmp_path / "out", max_loss=1000.0, quantised=False)
    found = run(speed=False, sparsities=[0.5], output=tmp_path / "out", overwrite=True, quantised=False)
    assert len(Comparison.load(tmp_path / "out").cells) == len(found.cells) == 2


def test_tables_of_somebody_else_are_not_replaced(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"comparison\.md exists already"):
        run(output=tmp_path / "out")
    assert (tmp_path / "out" / "comparison.md").read_text() == "mine"


def test_what_else_is_in_the_folder_is_not_replaced(run, tmp_path):
    (tmp_path / "out" / "profile").mkdir(parents=True)
    (tmp_path / "out" / "profile" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="profile exists already"):
        run(output=tmp_path / "out")
    with pytest.raises(countdown.ProfileError, match="is not a profile and nothing else"):
        run(output=tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["m-countdwn"]}, "Did you mean 'm-countdown'"),
        ({"methods": ["cats:weighting"]}, "is not a list of settings"),
        ({"methods": ["cats:sparsity=0.3"]}, "give --sparsity"),
        ({"methods": ["cats:bits=4"]}, "no field 'bits'"),
        ({"methods": ["cats", "cats:weighting=none"]}, "cats at 0.5 is asked for twice"),
        ({"methods": []}, "no method to compare"),
        ({"methods": ["griffin"]}, "griffin, topk chooses from prompts, and here every token is sparse"),
        ({"sparsities": [1.5]}, "expected 0 ≤ sparsity < 1"),
        ({"windows": 2}, "expected at least 4"),
        ({"max_loss": -1.0}, "expected more than 0"),
        ({"min_speedup": 1.5, "speed": False}, "speed is not measured"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"dtype": "int7"}, "dtype is 'int7'"),
        ({"device": "tpu"}, "device is 'tpu', expected auto, cpu"),
    ],
)
def test_mistakes_are_said_before_anything_loads(run, monkeypatch, change, message):
    monkeypatch.setattr(session, "load_model", None)
    monkeypatch.setattr(session, "load_tokenizer", None)
    with pytest.raises(ConfigError, match=message):
        run(**change)


def test_too_little_text_is_said_before_the_model_loads(run, monkeypatch):
    monkeypatch.setattr(session, "load_model", None)
    with pytest.raises(TextError, match="too few for 400 windows"):
        run(windows=400)
    with pytest.raises(TextError, match="too few for"):
        run(tokens=10_000_000)


def test_a_cache_that_cannot_be_written(run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COUNTDOWN_CACHE", str(tmp_path / "file" / "inside"))
    with pytest.raises(ConfigError, match=r"the cache cannot be used.*COUNTDOWN_CACHE"):
        run()


def test_pieces_join_to_the_text(tokenizer):
    text = "naïve — 東京 ☃"
    tokens = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == text
    assert found[:3] == ["n", "a", ""]
    assert "".join(pieces(tokenizer, tokens[:-1])).startswith("naïve — 東京 ")
