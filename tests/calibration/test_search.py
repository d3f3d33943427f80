"""The search for α of r-sparse: what it minimises, what it keeps when interrupted, and when it finds nothing better."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import countdown
from countdown import ConfigError, SearchSettings, TextError
from countdown.calibration import search
from countdown.calibration.evolution import LOWEST, evolve
from countdown.calibration.search import LENGTH, SAMPLES, search_alpha, search_samples
from countdown.evaluation.evaluate import evaluate
from countdown.methods import method
from tiny import llama

SMALL = SearchSettings(population=5, generations=3, groups=2)
CONFIG = method("r-sparse", sparsity=0.4)


def found_by(judge, **more):
    tried = []

    def counted(candidate):
        tried.append(candidate)
        return judge(candidate)

    return evolve(counted, 3, SearchSettings(**more)), tried


def off(*target):
    return lambda candidate: sum((one - other) ** 2 for one, other in zip(candidate, target, strict=True))


# -- differential evolution --------------------------------------------------------------------------------------------


def test_evolution_comes_closer_than_random_candidates():
    judge = off(0.93, 0.76, 0.81)
    best, tried = found_by(judge, population=16, generations=20)
    drawn, _ = found_by(judge, population=320, generations=1)
    assert len(tried) == 320
    assert judge(best) == min(map(judge, tried))
    assert judge(best) < 0.2 * judge(drawn)


def test_evolution_finds_no_low_rank_term_where_that_is_best():
    best, tried = found_by(off(1.0, 1.0, 1.0), generations=2)
    assert best == [1.0, 1.0, 1.0]
    assert tried[0] == best  # it is among the first candidates


def test_candidates_are_shares_with_three_decimals():
    _, tried = found_by(off(0.0, 0.5, 1.0), population=16, generations=30)
    values = [value for candidate in tried for value in candidate]
    assert min(values) < LOWEST  # mutation goes where nothing was drawn
    assert all(0 <= value <= 1 and value == round(value, 3) for value in values)


def test_the_same_seed_tries_the_same():
    assert found_by(off(0, 0, 0)) == found_by(off(0, 0, 0))
    assert found_by(off(0, 0, 0)) != found_by(off(0, 0, 0), seed=1)


@pytest.mark.parametrize("wrong", [{"population": 3}, {"generations": 0}, {"groups": 0.5}, {"seed": -1}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} of the search is .*, expected a whole number"):
        SearchSettings(**wrong)


# -- what is minimised -------------------------------------------------------------------------------------------------


def perplexities(model, tokenizer, text, config, record, **more):
    """What every candidate of a search gave."""
    search_alpha(model, tokenizer, text, config, settings=SMALL, record=record, progress=False, **more)
    return json.loads(record.read_text())["perplexities"]


def test_without_sparsity_all_ones_are_the_dense_model(llama_model, tokenizer, text, tmp_path):
    found = perplexities(llama_model, tokenizer, text, method("r-sparse", sparsity=0), tmp_path / "record")
    samples, _ = search_samples(tokenizer, text)
    with torch.no_grad():
        logits = llama_model(torch.stack(samples)).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, torch.stack(samples)[:, 1:].flatten())
    assert found[0] == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_candidate_gives_the_perplexity_of_the_sparsified_model(llama_model, tokenizer, text, tmp_path):
    config = method("r-sparse", sparsity=0.4, decision="topk")
    tried = []
    record = tmp_path / "record"
    found = perplexities(llama_model, tokenizer, text, config, record)
    evolve(lambda candidate: tried.append(candidate) or found[len(tried) - 1], 14, SMALL)
    samples, _ = search_samples(tokenizer, text)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # The first two of three layers are one group.
    groups = [(f"model.layers.[{layers}].*.{kind}", kind) for layers in ("01", "2") for kind in kinds]
    alpha = {pattern: tried[-1][place] for place, (pattern, _) in enumerate(groups)}
    assert set(alpha.values()) != {1.0}
    made = countdown.calibrate(
        llama_model, tokenizer, text, method("r-sparse", sparsity=0.4, decision="topk", alpha=alpha)
    )
    countdown.sparsify_(llama_model, made)
    measured = evaluate(llama_model, torch.stack(samples), progress=False)
    assert found[-1] == pytest.approx(measured.perplexity, rel=1e-4)


def test_thresholds_drop_the_share_that_alpha_says(llama_model, tokenizer, text, monkeypatch):
    shares = []
    kept = search._Trial._active

    def counted(self, site, sum_, x, factors):
        active = kept(self, site, sum_, x, factors)
        shares.append((float(active.float().mean()), 1 - self._methods[site.name].dropped))
        return active

    monkeypatch.setattr(search._Trial, "_active", counted)
    monkeypatch.setattr(search, "STRIDE", 1)
    search_alpha(llama_model, tokenizer, text, CONFIG, settings=SMALL, progress=False)
    assert len({wanted for _, wanted in shares}) > 3
    assert all(real == pytest.approx(wanted, abs=0.03) for real, wanted in shares)


# -- what is found -----------------------------------------------------------------------------------------------------


def test_a_search_repeats_itself_and_leaves_the_model_alone(llama_model, tokenizer, text):
    before = dict(llama_model.named_modules())
    first, again = (
        search_alpha(llama_model, tokenizer, text, CONFIG, settings=SMALL, progress=False) for _ in range(2)
    )
    assert first == again
    assert first.evaluations == 15
    assert first.perplexity <= first.uniform_perplexity
    assert dict(llama_model.named_modules()) == before


@pytest.mark.parametrize("holds", [True, False])
def test_what_does_not_hold_on_other_samples_is_not_taken(llama_model, tokenizer, text, monkeypatch, holds):
    samples, _ = search_samples(tokenizer, text)

    def judged(self, alphas, batches):
        searched_on = bool((batches[0][0] == samples[0]).all())
        mean = sum(alphas.values()) / len(alphas)
        return 10 + mean if searched_on or holds else 10 - mean

    monkeypatch.setattr(search._Trial, "perplexity", judged)
    found = search_alpha(llama_model, tokenizer, text, CONFIG, settings=SMALL, progress=False)
    assert found.perplexity < found.uniform_perplexity == 11
    assert found.holds == holds
    if holds:
        assert min(value for _, value in found.method.alpha) < 1
        countdown.calibrate(llama_model, tokenizer, text, found.method)
    else:
        assert found.method == method("r-sparse", sparsity=0.4, alpha=1.0)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on(llama_model, tokenizer, text, tmp_path, capsys):
    whole = perplexities(llama_model, tokenizer, text, CONFIG, tmp_path / "whole")
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    hook = llama_model.register_forward_pre_hook(interrupt)
    record = tmp_path / "record"
    modules = dict(llama_model.named_modules())
    with pytest.raises(KeyboardInterrupt):
        search_alpha(llama_model, tokenizer, text, CONFIG, settings=SMALL, record=record)
    assert dict(llama_model.named_modules()) == modules
    first = json.loads(record.read_text())["perplexities"]
    assert 0 < len(first) < len(whole)
    assert f"{len(first)} candidates are kept in {record}" in capsys.readouterr().err
    hook.remove()
    assert perplexities(llama_model, tokenizer, text, CONFIG, record) == whole


def test_a_whole_record_is_not_tried_again(llama_model, tokenizer, text, tmp_path):
    record = tmp_path / "record"
    found = perplexities(llama_model, tokenizer, text, CONFIG, record)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"perplexities": [one + 1 for one in found]}))
    assert perplexities(llama_model, tokenizer, text, CONFIG, record) == [one + 1 for one in found]


@pytest.mark.parametrize("other", ["settings", "text", "sparsity", "weights", "nonsense"])
def test_a_record_of_another_search_is_refused(llama_model, tokenizer, text, tmp_path, other):
    record = tmp_path / "record"
    perplexities(llama_model, tokenizer, text, CONFIG, record)
    settings = SearchSettings(population=5, generations=4, groups=2) if other == "settings" else SMALL
    config = method("r-sparse", sparsity=0.3) if other == "sparsity" else CONFIG
    if other == "weights":
        with torch.no_grad():
            llama_model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    if other == "nonsense":
        record.write_text("{}")
    before = record.read_text()
    given = (llama_model, tokenizer, text[other == "text" :], config)
    with pytest.raises(ConfigError, match=r"is the record of .*overwrite=True searches anew|is no record of a search"):
        search_alpha(*given, settings=settings, record=record)
    assert record.read_text() == before
    if other != "nonsense":  # whatever that is, it is not for us to remove
        search_alpha(*given, settings=settings, record=record, overwrite=True, progress=False)
        assert json.loads(record.read_text())["search"] != json.loads(before)["search"]


def test_overwriting_goes_on_with_a_record_that_fits(llama_model, tokenizer, text, tmp_path):
    record = tmp_path / "record"
    whole = perplexities(llama_model, tokenizer, text, CONFIG, record)
    kept = json.loads(record.read_text()) | {"perplexities": [*whole[:3], 1.0]}
    record.write_text(json.dumps(kept))
    assert perplexities(llama_model, tokenizer, text, CONFIG, record, overwrite=True)[:4] == [*whole[:3], 1.0]


def overflowing(monkeypatch, where):
    """Let what a low rank adds, or else all that a linear gives, not be finite."""
    kept = search._Trial._added

    def added(self, site, x, dropped):
        found = kept(self, site, x, dropped)
        return found * math.inf if found is not None else x.new_tensor(math.inf) if where == "everywhere" else None

    monkeypatch.setattr(search._Trial, "_added", added)


def test_a_candidate_that_is_not_finite_is_the_worst(llama_model, tokenizer, text, tmp_path, monkeypatch):
    overflowing(monkeypatch, "low ranks")
    found = perplexities(llama_model, tokenizer, text, CONFIG, tmp_path / "record")
    assert math.isfinite(found[0])
    assert math.isinf(max(found))
    assert perplexities(llama_model, tokenizer, text, CONFIG, tmp_path / "record") == found
    overflowing(monkeypatch, "everywhere")
    with pytest.raises(countdown.CountdownError, match="with α = 1 everywhere the logits are not finite"):
        search_alpha(llama_model, tokenizer, text, CONFIG, settings=SMALL)


def test_a_model_with_a_short_context(tokenizer, text):
    model = llama(max_position_embeddings=64)
    found = search_alpha(model, tokenizer, text, CONFIG, settings=SMALL, progress=False)
    assert found.evaluations == 15


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_samples_are_spread_and_apart(tokenizer, text):
    samples, others = search_samples(tokenizer, text)
    assert len(samples) == len(others) == SAMPLES
    assert {len(one) for one in samples + others} == {LENGTH}
    assert len({tuple(one.tolist()) for one in samples + others}) == 2 * SAMPLES


def test_short_text(llama_model, tokenizer):
    with pytest.raises(TextError, match="too few for 32 windows"):
        search_alpha(llama_model, tokenizer, "a few words", CONFIG)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(TextError, match="at least two sequences"):
        search_alpha(llama_model, tokenizer, batch, CONFIG)


def test_another_method(llama_model, tokenizer, text):
    with pytest.raises(ConfigError, match="the search is for α of r-sparse, and teal"):
        search_alpha(llama_model, tokenizer, text, method("teal", sparsity=0.4))


def test_a_sparsified_model(tokenizer, text):
    model = llama()
    countdown.sparsify_(model, countdown.calibrate(model, tokenizer, text, method("teal"), progress=False))
    with pytest.raises(countdown.UnsupportedModelError, match="sparsified already"):
        search_alpha(model, tokenizer, text, CONFIG)
