"""What a package can add without touching a file of this one: a weight format, a selector, a kind of site, an
allocation, a method with a first moment."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import ArceeConfig, ArceeForCausalLM

import countdown
import oracle
from countdown import allocation, methods, selectors, sites, sums, weights
from countdown.artifacts import Moment
from countdown.calibration import passes
from countdown.calibration.calibrate import calibration_sequences
from countdown.cost import TokenBytes, token_bytes
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.methods import Method, method
from countdown.modules import sparse_modules
from countdown.sites import holders
from countdown.sites.decoder import stacks, unsupported
from countdown.sites.holders import Rows
from countdown.sites.recognise import TOLERANCE, error_of
from countdown.sparsify import sparse_twin
from countdown.weights import Plain, Weight
from tiny import SMALL, llama, spread

IDS = torch.tensor([[5, 17, 90, 3, 250, 64, 31, 8]])
REGISTRIES = (
    weights.FORMATS, selectors.SELECTORS, sums.SUMS, sites.SITES, allocation.ALLOCATIONS, methods.METHODS,
    passes.PASSES,
)  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test adds is gone after it."""
    for registry in REGISTRIES:
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(holders, "HOLDERS", list(holders.HOLDERS))


def calibrated(model, tokenizer, text, config):
    return countdown.calibrate(model, tokenizer, text, config, tokens=1024, progress=False)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def masked(model):
    """The logits of a copy of a sparse model whose modules are masked by hand."""
    for module in list(sparse_modules(model).values()):
        sum_ = module.site.sum

        def forward(x, module=module, sum_=sum_):
            factors = sum_.project(x)
            value = module.selector.score(sum_, x, module.parts, factors)
            coefficients = torch.stack(list(factors)).prod(dim=0)
            return sum_.combine(coefficients * (value > module.per_term))

        module.forward = forward
    return logits(model)


# A weight format, and what holds it


class Int8(Weight):
    """Integers [rows, columns] times a scale a row."""

    format = "int8-rows"
    part_names = ("integers", "scales")

    def values(self):
        return self.parts[0].float() * self.parts[1][:, None]

    def problem(self):
        fits = self.parts[0].dtype == torch.int8 and self.parts[1].shape == (self.shape[0],)
        return None if fits else "is not int8 with a scale a row"

    def sliced(self, dim, part):
        return self if dim else Int8([tensor[part] for tensor in self.parts], self.shape)


class Int8Linear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(dim=1) / 127
        self.register_buffer("integers", (linear.weight.detach() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x):
        return F.linear(x, (self.integers.float() * self.scales[:, None]).to(x.dtype))


class Int8Holder(holders.Holder):
    def holds(self, module):
        return isinstance(module, Int8Linear)

    def read(self, module):
        return Int8([module.integers, module.scales], (module.out_features, module.in_features)), None

    def store(self, module, weight):
        raise AssertionError("there is no other layout")


def quantised(**more):
    model = llama(**more)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    return model


@pytest.mark.parametrize("name", ["m-countdown", "d-proxy"])
def test_a_weight_format(name, tokenizer, text):
    weights.register(Int8)
    holders.HOLDERS.insert(0, Int8Holder())
    model = quantised()
    profile = calibrated(model, tokenizer, text, method(name, sparsity=0.5))
    countdown.sparsify_(model, profile, apply_to="all")
    first = countdown.status(model)[0]
    assert first.backend == "reference"
    assert first.backend_reason == "it has no kernel for weights in format 'int8-rows'"
    found = logits(model)
    share = 1 - countdown.status(model)[0].realised_sparsity
    rows, columns = 53 * (24 + 4), 24 * (53 + 4)
    if name == "m-countdown":
        read = (rows + share * (rows + columns)) / (2 * rows + columns)
        assert countdown.status(model)[0].weights_read == pytest.approx(read)
    torch.testing.assert_close(found, masked(model), rtol=1e-4, atol=1e-4)
    out = countdown.restore_(model).generate(IDS, max_new_tokens=3, pad_token_id=0)
    assert out.shape == (1, 11)
    twin = sparse_twin(model, profile)
    assert (bool(sparse_modules(twin)), bool(sparse_modules(model))) == (True, False)
    ffns = sites.find_sites(model, ["ffn"])
    plain = token_bytes(llama(), sites.find_sites(llama(), ["ffn"]))
    assert token_bytes(model, ffns) == TokenBytes(3 * (2 * rows + columns), plain.other)


def test_a_weight_format_that_only_an_entry_point_names(tokenizer, text, monkeypatch):
    def load():
        holders.HOLDERS.insert(0, Int8Holder())
        return Int8

    monkeypatch.setattr(weights.FORMATS, "_complete", False)
    entry = SimpleNamespace(name="int8-rows", load=load)
    monkeypatch.setattr("countdown.registry.entry_points", lambda group: [entry] * (group == "countdown.weights"))
    model = quantised()
    countdown.sparsify_(model, calibrated(model, tokenizer, text, method("cats")), apply_to="all")
    assert logits(model).isfinite().all()


# A selector


@dataclass(frozen=True)
class LowRank(selectors.Selector):
    """|U V x| with the first singular vectors of W_up."""

    name = "low-rank-up"
    indicator = "low-rank"
    reads = ()
    rank: int = 6

    def make(self, sum_, artifacts):
        u, s, vt = torch.linalg.svd(sum_.weights[1].values().float(), full_matrices=False)
        return Plain([vt[: self.rank]]), Plain([(u * s)[:, : self.rank].contiguous()])

    def shapes(self, d, terms):
        return (self.rank, d), (terms, self.rank)

    def accepts(self, formats):
        return list(formats) == ["plain", "plain"]

    def part_bytes(self, sum_):
        h, d = sum_.weights[1].shape
        return self.rank * (h + d) * 4

    def score(self, sum_, x, parts, factors):
        down, up = parts
        return up.product(down.product(x.float())).abs()


LOW_RANK = LowRank()


@dataclass(frozen=True, kw_only=True)
class ByLowRank(Method):
    name = "by-low-rank"
    summary = source = "a test"
    unseen = None
    weightings = ("none",)
    selector = LOW_RANK


def test_a_selector(tokenizer, text):
    methods.register(ByLowRank)
    model = llama()
    profile = calibrated(model, tokenizer, text, method("by-low-rank", sparsity=0.5))
    countdown.sparsify_(model, profile, apply_to="all")
    found = logits(model)
    first = countdown.status(model)[0]
    assert 0.2 < first.realised_sparsity < 0.8
    assert first.beside_bytes == 6 * (53 + 24) * 4
    assert first.weights_read == pytest.approx(6 * (53 + 24) / (3 * 24 * 53) + 1 - first.realised_sparsity)
    assert profile.recipe.record()["indicator"] == "low-rank"
    copy.deepcopy(model)
    torch.testing.assert_close(found, masked(model), rtol=1e-4, atol=1e-4)


# A kind of site, with what it sums


class Pair(sums.Sum):
    """W_down act(W_up x)."""

    kind = "pair"
    roles = ("up", "down")
    factors = ("up",)

    @staticmethod
    def shapes(d, terms):
        return (terms, d), (d, terms)

    def project(self, x):
        return (F.relu(self.weights[0].product(x, self.biases[0])).square(),)


@dataclass(frozen=True)
class PairFFN(sites.Site):
    sum_class = Pair

    def rows(self):
        return Rows("up_proj"), Rows("down_proj")

    @property
    def shape(self):
        h, d = self.weights[0].shape
        return {"kind": self.kind, "d": d, "h": h}

    @staticmethod
    def axes(shape):
        return {"terms": shape["h"], "inputs": shape["d"]}


def find_pairs(model):
    found = [PairFFN(f"{path}.mlp", layer.mlp) for stack in stacks(model) for path, layer in stack]
    for site in found:
        if error_of(site) > TOLERANCE:
            raise unsupported(model, f"{site.name} does not compute down(relu(up(x))²).")
    return found


@dataclass(frozen=True, kw_only=True)
class OfPairs(Method):
    name = "of-pairs"
    summary = source = "a test"
    kind = "pair"
    unseen = None
    weightings = ("none", "column-norm")
    selector = selectors.Factor("activated-up", reads=("up",), formula=lambda a: a.abs())


def test_a_kind_of_site(tokenizer, text, tmp_path):
    sites.register(sites.Kind(PairFFN, find_pairs))
    methods.register(OfPairs)
    torch.manual_seed(0)
    model = spread(ArceeForCausalLM(ArceeConfig(**SMALL)).eval())
    config = method("of-pairs", sparsity=0.6, weighting="column-norm")
    path = calibrated(model, tokenizer, text, config).save(tmp_path / "p")
    dense = logits(model)
    countdown.sparsify_(model, countdown.Profile.load(path), apply_to="all")
    found = countdown.evaluate(model, IDS, progress=False)
    assert found.realised_sparsity == pytest.approx(0.6, abs=0.1)
    assert found.weights_read == pytest.approx(0.5 + (1 - found.realised_sparsity) / 2)
    torch.testing.assert_close(logits(model), masked(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(countdown.restore_(model)), dense)
    with pytest.raises(UnsupportedModelError, match="does not compute"):
        calibrated(llama(), tokenizer, text, config)


# An allocation


class LastLayersFirst(allocation.Allocation):
    """All of the budget in the last layers."""

    name = "last-layers-first"

    def allocate(self, problem):
        left, found = problem.sparsity * sum(problem.sizes.values()), {}
        for name in reversed(problem.sizes):
            found[name] = max(0.0, min(0.9, left / problem.sizes[name]))
            left -= found[name] * problem.sizes[name]
        return {name: found[name] for name in problem.sizes}


def test_an_allocation(tokenizer, text):
    allocation.register(LastLayersFirst())
    model = llama()
    profile = calibrated(model, tokenizer, text, method("cats", sparsity=0.5, allocation="last-layers-first"))
    countdown.sparsify_(model, profile)
    assert [site.target_sparsity for site in countdown.status(model)] == pytest.approx([0.0, 0.6, 0.9])


@pytest.mark.parametrize("found", [{}, {"model.layers.0.mlp": 1.5}, {"elsewhere": 0.5}])
def test_an_allocation_that_gives_no_sparsity_is_named(found, tokenizer, text):
    class Wrong(allocation.Allocation):
        name = "wrong"

        def allocate(self, problem):
            return {**dict.fromkeys(problem.sizes, 0.5), **found} if found else {}

    allocation.register(Wrong())
    with pytest.raises(ConfigError, match=r"allocation 'wrong' gives .* no sparsity of 0 or more and below 1"):
        calibrated(llama(), tokenizer, text, method("cats", allocation="wrong"))


@pytest.mark.parametrize(
    "register, entry, message",
    [
        (selectors.register, LowRank, "register an instance, such as Selector"),
        (allocation.register, LastLayersFirst, "register an instance, such as Allocation"),
        (sites.register, PairFFN, "register an instance, such as Kind"),
        (weights.register, LOW_RANK, "is no class derived from Weight"),
    ],
)
def test_what_is_no_such_thing_is_refused(register, entry, message):
    with pytest.raises(ConfigError, match=message):
        register(entry)


# A method with a first moment


@dataclass(frozen=True, kw_only=True)
class Centred(Method):
    """|u| times the standard deviation of a."""

    name = "centred"
    summary = source = "a test"
    unseen = "gate"
    weightings = ("none", "rms")
    selector = selectors.UP

    def moments(self):
        return Moment("gate", 1), Moment("gate", 2)

    def multipliers(self, moments, norms):
        return (moments[Moment("gate", 2)] - moments[Moment("gate", 1)].square()).clamp(min=0).sqrt()


def test_a_method_with_a_first_moment(tokenizer, text):
    methods.register(Centred)
    model = llama()
    profile = calibrated(model, tokenizer, text, method("centred", weighting="rms"))
    site, inputs = sites.find_sites(model, ["ffn"])[0], []
    site.module.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        for sequence in calibration_sequences(tokenizer, text, 1024):
            model(sequence[None])
        a, _ = site.sum.project(torch.cat(inputs, dim=1)[0])
    expected = a.double().std(dim=0, unbiased=False)
    assert oracle.relative_error(profile.entries[0].sites[site.name]["multipliers"], expected) < 1e-5


def test_a_moment_of_an_unknown_factor_names_the_known_ones(tokenizer, text):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Centred):
        name = "wrong"

        def moments(self):
            return (Moment("gaet", 1),)

    methods.register(Wrong)
    message = "factor of a moment of wrong is 'gaet', expected one of: gate, up, input. Did you mean 'gate'"
    with pytest.raises(ConfigError, match=message):
        calibrated(llama(), tokenizer, text, method("wrong", weighting="rms"))
