"""Settings, weights and costs of the methods, and the registry."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from countdown.artifacts import Moment
from countdown.errors import ConfigError
from countdown.methods import METHODS, Method, method, method_class, method_names, named, parse_method, register
from countdown.profiles.recipe import Recipe
from countdown.selectors import UP, Factor


def every_setting():
    for name in method_names():
        cls = method_class(name)
        for decision in cls.decisions:
            for weighting in cls.weightings:
                yield method(name, decision=decision, weighting=weighting, sparsity=0.25)


def test_the_three_methods_are_there():
    assert {"m-countdown", "cats", "d-countdown"} <= set(method_names())


@pytest.mark.parametrize("config", list(every_setting()), ids=str)
def test_settings_survive_a_round_trip(config):
    assert parse_method(config.to_dict()) == config


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("m-countdwn", {}, "Did you mean 'm-countdown'"),
        ("cats", {"sparsty": 0.5}, "Did you mean 'sparsity'"),
        ("cats", {"sparsity": 70}, "0.7 skips 70%"),
        ("cats", {"sparsity": 1.0}, "0 ≤ sparsity < 1"),
        ("cats", {"sparsity": -0.1}, "0 ≤ sparsity < 1"),
        ("cats", {"sparsity": float("nan")}, "0 ≤ sparsity < 1"),
        ("cats", {"sparsity": 10**400}, "0 ≤ sparsity < 1"),
        ("cats", {"sparsity": "0.5"}, "expected a number"),
        ("cats", {"sparsity": True}, "expected a number"),
        ("cats", {"decision": "top-k"}, "Did you mean 'topk'"),
        ("cats", {"weighting": "rsm"}, "Did you mean 'rms'"),
        ("d-countdown", {"weighting": "rms"}, "expected one of: none, column-norm"),
        ("wina", {"weighting": "none"}, "for weighting 'none' use teal"),
        ("chess", {}, r"'chess' is a recipe of several methods \(cats, teal\), and here one is expected"),
        ("cats", {"second_look": 0.9}, r"second_look of cats is 0.9, expected 0 to 0.5 \(0.15 is usual, 0 for none\)"),
        ("cats", {"second_look": True}, "second_look of cats is True, expected 0 to 0.5"),
        ("cats", {"second_look": 0.1, "decision": "topk"}, "'topk' of cats does not go with a second look"),
        ("d-proxy", {"second_look": 0.1}, "method 'd-proxy' has no field 'second_look'"),
        ("d-proxy", {"bits": 5}, "bits of d-proxy is 5, expected 3 or 4"),
        ("d-proxy", {"bits": "4"}, "bits of d-proxy is '4', expected 3 or 4"),
    ],
)
def test_bad_settings_say_what_is_wrong(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        method(name, **settings)


def test_a_decision_that_a_method_does_not_offer_is_refused_with_its_reason():
    @dataclass(frozen=True, kw_only=True)
    class OnlyTopk(Method):
        name = "only-topk"
        summary = source = ""
        unseen = None
        selector = UP
        decisions = {"topk": "(no threshold is known)"}  # noqa: RUF012

    with pytest.raises(ConfigError, match=r"does not offer decision 'threshold', only: topk \(no threshold is known\)"):
        OnlyTopk()


def test_wina_is_teal_with_norms_that_are_shared():
    assert method("wina", sparsity=0.4) == method("teal", sparsity=0.4, weighting="shared-norm")


def test_chess_is_cats_with_rms_and_thresholds_on_the_inputs_of_q_and_o():
    entries = Recipe.named("chess", sparsity=0.7).entries
    assert named("chess") is not None
    assert [(entry.pattern, entry.method) for entry in entries] == [
        ("*", method("cats", sparsity=0.7, weighting="rms")),
        ("*.q_proj", method("teal", sparsity=0.7)),
        ("*.o_proj", method("teal", sparsity=0.7)),
    ]


def test_the_old_name_of_a_weighting_is_an_alias():
    assert method("cats", weighting="rms-norm") == method("cats", weighting="column-norm")
    assert method("cats", weighting="rms-norm").to_dict()["weighting"] == "column-norm"


def test_a_newer_version_is_refused():
    with pytest.raises(ConfigError, match="upgrade"):
        parse_method({"name": "cats", "version": 99})


MOMENTS = {
    Moment("gate"): torch.tensor([4.0, 9.0, 0.0]).double(),
    Moment("up"): torch.tensor([1.0, 16.0, 25.0]).double(),
}
NORMS = torch.tensor([1.0, 10.0, 100.0]).double()


@pytest.mark.parametrize(
    "name, weighting, expected",
    [
        ("m-countdown", "none", None),
        ("m-countdown", "rms", [2.0, 3.0, 0.0]),
        ("m-countdown", "column-norm", [2.0, 30.0, 0.0]),
        ("cats", "rms", [1.0, 4.0, 5.0]),
        ("cats", "column-norm", [1.0, 40.0, 500.0]),
        ("d-countdown", "none", None),
        ("d-countdown", "column-norm", [1.0, 10.0, 100.0]),
    ],
)
def test_multipliers(name, weighting, expected):
    config = method(name, weighting=weighting)
    moments = {key: MOMENTS[key] for key in config.moments()}
    weights = config.multipliers(moments, NORMS)
    assert (None if weights is None else weights.tolist()) == expected


def test_only_what_is_needed_is_estimated():
    assert method("m-countdown").moments() == ()
    assert method("m-countdown", weighting="rms").moments() == (Moment("gate"),)
    assert method("cats", weighting="rms").moments() == (Moment("up"),)
    assert method("d-countdown", weighting="column-norm").moments() == ()
    assert method("d-proxy").moments() == (Moment("input"),)


@pytest.mark.parametrize(
    "sparsity, neurons, drop", [(0.7, 10, 7), (0.29, 100, 29), (0.5, 3, 1), (0.0, 7, 0), (0.9999, 7, 6)]
)
def test_drop_is_the_floor(sparsity, neurons, drop):
    assert method("cats", sparsity=sparsity).drop(neurons) == drop


def test_a_broken_package_is_named_only_when_asked_for(monkeypatch):
    monkeypatch.setitem(METHODS.broken, "broken", ImportError("no module named 'gone'"))
    assert method("cats").name == "cats"
    with pytest.raises(ConfigError, match="'broken' of an installed package cannot be loaded: ImportError"):
        method("broken")


def test_registering_checks_the_class():
    @dataclass(frozen=True, kw_only=True)
    class Nameless(Method):
        selector = UP

    with pytest.raises(ConfigError, match="sets no 'name'"):
        register(Nameless)

    @dataclass(frozen=True, kw_only=True)
    class Impostor(Method):
        name = "wina"
        summary = source = ""
        unseen = None
        selector = UP

    with pytest.raises(ConfigError, match="'wina' is registered already"):
        register(Impostor)

    @dataclass(frozen=True, kw_only=True)
    class OtherUp(Method):
        name = "other-up"
        summary = source = ""
        unseen = None
        selector = Factor("up", reads=("up",), formula=lambda a, u: u)

    with pytest.raises(ConfigError, match="selector named 'up' is registered already"):
        register(OtherUp)

    @dataclass(frozen=True, kw_only=True)
    class Undecided(Method):
        name = "undecided"
        summary = source = ""
        unseen = None

    with pytest.raises(ConfigError, match="sets no 'selector' of type Selector"):
        register(Undecided)
    assert "other-up" not in method_names()
