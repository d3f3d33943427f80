"""Settings, weights and costs of the methods, and the registry."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from countdown.errors import ConfigError
from countdown.methods import Method, _registry, method, method_class, method_names, parse_method, register
from countdown.ops.indicators import PROXY, UP, Indicator


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
        ("d-countdown", {"weighting": "rms"}, "expected one of: none, rms-norm"),
        ("chess", {"weighting": "none"}, "for weighting 'none' use cats"),
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
        indicator = UP
        decisions = {"topk": "(no threshold is known)"}  # noqa: RUF012

    with pytest.raises(ConfigError, match=r"does not offer decision 'threshold', only: topk \(no threshold is known\)"):
        OnlyTopk()


def test_chess_is_cats_with_rms():
    assert method("chess", sparsity=0.7) == method("cats", sparsity=0.7, weighting="rms")


def test_a_newer_version_is_refused():
    with pytest.raises(ConfigError, match="upgrade"):
        parse_method({"name": "cats", "version": 99})


MOMENTS = {"gate": torch.tensor([4.0, 9.0, 0.0]).double(), "up": torch.tensor([1.0, 16.0, 25.0]).double()}
NORMS = torch.tensor([1.0, 10.0, 100.0]).double()


@pytest.mark.parametrize(
    "name, weighting, expected",
    [
        ("m-countdown", "none", None),
        ("m-countdown", "rms", [2.0, 3.0, 0.0]),
        ("m-countdown", "rms-norm", [2.0, 30.0, 0.0]),
        ("cats", "rms", [1.0, 4.0, 5.0]),
        ("cats", "rms-norm", [1.0, 40.0, 500.0]),
        ("d-countdown", "none", None),
        ("d-countdown", "rms-norm", [1.0, 10.0, 100.0]),
    ],
)
def test_weights(name, weighting, expected):
    config = method(name, weighting=weighting)
    moments = {key: MOMENTS[key] for key in config.moments()}
    weights = config.weights(moments, NORMS)
    assert (None if weights is None else weights.tolist()) == expected


def test_only_what_is_needed_is_estimated():
    assert method("m-countdown").moments() == ()
    assert method("m-countdown", weighting="rms").moments() == ("gate",)
    assert method("cats", weighting="rms").moments() == ("up",)
    assert method("d-countdown", weighting="rms-norm").moments() == ()
    assert method("d-proxy").moments() == ("input",)


@pytest.mark.parametrize(
    "name, active, expected",
    [("m-countdown", 0.3, 1.6 / 3), ("cats", 0.1, 1.2 / 3), ("d-countdown", 0.3, 2.3 / 3), ("cats", 1.0, 1.0)],
)
def test_weights_read(name, active, expected):
    assert method(name).weights_read(active) == pytest.approx(expected)


def test_a_proxy_counts_as_read():
    # 4 bits and a 16-bit scale for 64 weights, of two matrices out of three.
    assert method("d-proxy").weights_read(0.2) == pytest.approx(0.2 + 2 / 3 * 4.25 / 16)
    assert method("d-proxy", bits=3).weights_read(0.2, itemsize=4) == pytest.approx(0.2 + 2 / 3 * 3.25 / 32)


@pytest.mark.parametrize(
    "sparsity, neurons, drop", [(0.7, 10, 7), (0.29, 100, 29), (0.5, 3, 1), (0.0, 7, 0), (0.9999, 7, 6)]
)
def test_drop_is_the_floor(sparsity, neurons, drop):
    assert method("cats", sparsity=sparsity).drop(neurons) == drop


def test_a_broken_package_is_named_only_when_asked_for(monkeypatch):
    monkeypatch.setitem(_registry._BROKEN, "broken", ImportError("no module named 'gone'"))
    assert method("cats").name == "cats"
    with pytest.raises(ConfigError, match="'broken' of an installed package cannot be loaded: ImportError"):
        method("broken")


def test_registering_checks_the_class():
    @dataclass(frozen=True, kw_only=True)
    class Nameless(Method):
        indicator = UP

    with pytest.raises(ConfigError, match="sets no 'name'"):
        register(Nameless)

    @dataclass(frozen=True, kw_only=True)
    class Impostor(Method):
        name = "chess"
        summary = source = ""
        unseen = None
        indicator = UP

    with pytest.raises(ConfigError, match="'chess' is registered already"):
        register(Impostor)

    @dataclass(frozen=True, kw_only=True)
    class OtherUp(Method):
        name = "other-up"
        summary = source = ""
        unseen = None
        indicator = Indicator("up", reads=("up",), formula=lambda a, u: u)

    with pytest.raises(ConfigError, match="indicator named 'up'"):
        register(OtherUp)

    @dataclass(frozen=True, kw_only=True)
    class NoBits(Method):
        name = "no-bits"
        summary = source = ""
        unseen = None
        indicator = PROXY

    with pytest.raises(ConfigError, match="'proxy' and proxy_bits go together"):
        register(NoBits)
    assert "other-up" not in method_names()
