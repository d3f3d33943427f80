"""The benchmarks on a CPU that stands in for a GPU: what they check and record, not how fast anything is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import countdown
import countdown.benchmark.arm as arm
import countdown.benchmark.decode as decode
import countdown.benchmark.ffn as ffn
from countdown.benchmark.ffn import FFNBenchmark
from countdown.benchmark.timing import in_turn, paired_ratio, relative_error
from countdown.errors import ConfigError
from countdown.methods import method
from countdown.modules import sparse_modules
from countdown.ops.cpu import library
from tiny import llama


@pytest.fixture
def device(monkeypatch):
    """A CPU with memory of 1 GB/s, on which every step takes 10 µs."""

    def timed(step, _):
        def once():
            step()
            return 10.0

        return once

    for module in (ffn, decode):
        monkeypatch.setattr(module, "floor_rate", lambda _: lambda: 1e9)
    monkeypatch.setattr(ffn, "require_cuda", lambda: torch.device("cpu"))
    monkeypatch.setattr(ffn, "timed", timed)
    monkeypatch.setattr(arm, "timed", timed)
    pytest.importorskip("triton")  # its interpreter runs the kernel of a given set
    monkeypatch.setattr(ffn.backends, "missing", lambda _: None)
    monkeypatch.setattr(ffn, "_sizes", lambda _: (50000, 10**6))


def test_ffn_records(device):
    union = {(3, 0.5): 0.6}
    benchmark = FFNBenchmark(shapes=[(24, 96)], sparsities=(0.0, 0.5), tokens=(1, 3), union=union, dtype="float32")
    records = list(ffn.run(benchmark, progress=False))
    assert len(records) == 2 * 2 * 4
    # Two matrices of 96 rows: 24 levels of 4 bits and a scale of 2 bytes for the one group of 32.
    proxy = 2 * 96 * (32 / 2 + 2) / (24 * 96 * 4)
    for record in records:
        share = record["union"]
        matrices = {"given": 3 * share, "d-proxy": proxy + 3 * share}.get(record["method"], 1 + 2 * share)
        assert record["weights_read"] == pytest.approx(matrices / 3)
        assert record["floor_us"] == pytest.approx(record["weights_read"] * 3 * 24 * 96 * 4 / 1e9 * 1e6)
        assert record["realised_sparsity"] == pytest.approx(record["sparsity"], abs=0.02)
        assert record["error"] < 1e-5
        assert record["time_us"] == 10 / record["layers"]
        assert record["floor_share"] == pytest.approx(record["floor_us"] / record["time_us"])
        if record["tokens"] == 1 or record["sparsity"] == 0:
            assert share == pytest.approx(1 - record["realised_sparsity"])
    (shared,) = [r for r in records if r["tokens"] == 3 and r["sparsity"] == 0.5 and r["method"] == "m-countdown"]
    assert 0.5 < shared["union"] < 0.8  # independent sets would need 0.875


def test_steps_of_ffns_are_recorded_on_a_cpu(device, monkeypatch):
    calls = []
    run = ffn._Deciding.run
    monkeypatch.setattr(ffn._Deciding, "run", lambda self, layer: (calls.append(layer), run(self, layer))[1])
    monkeypatch.setattr(ffn, "timed", lambda step, device: lambda: (step(), 10.0)[1])
    (record,) = ffn.run(FFNBenchmark(shapes=[(8, 16)], methods=["cats"], sparsities=[0.5]), progress=False)
    # One to check it, one round for what is realised, and two to record; what is timed calls it no more.
    assert len(calls) == 1 + 3 * record["layers"]


def test_the_methods_with_kernels_are_measured_by_default():
    assert sorted(ffn.measurable()) == ["cats", "d-proxy", "m-countdown"]


def test_what_computes_wrong_has_no_speed(device, monkeypatch):
    right = ffn._Deciding.run
    monkeypatch.setattr(ffn._Deciding, "run", lambda self, layer: 0 * right(self, layer))
    (record,) = ffn.run(FFNBenchmark(shapes=[(8, 16)], methods=["cats"], sparsities=[0.5]), progress=False)
    assert record["error"] == 1
    assert "time_us" not in record
    assert "speedup" not in record


def test_nan_is_the_largest_error():
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1).double()) == float("inf")


def test_a_shape_that_does_not_fit_is_refused(device):
    with pytest.raises(ConfigError, match=r"an FFN of 4096 × 4096 in bfloat16 does not fit the 0 GB left"):
        next(ffn.run(FFNBenchmark(shapes=[(4096, 4096)], sparsities=[0.5]), progress=False))


def test_a_decision_alone_is_measured(device):
    (record,) = ffn.run(FFNBenchmark(shapes=[(8, 16)], methods=["d-proxy"], sparsities=[1.0]), progress=False)
    assert record["realised_sparsity"] == 1
    assert record["error"] == 0
    assert record["floor_us"] > 0


def test_hardly_anything_active_still_runs(device):
    (record,) = ffn.run(FFNBenchmark(shapes=[(8, 16)], methods=["cats"], sparsities=[0.9999]), progress=False)
    assert record["layers"] >= 1


def test_without_kernels_there_is_nothing_to_measure(on_reference):
    with pytest.raises(ConfigError, match="no kernels to measure: COUNTDOWN_BACKEND is 'reference'"):
        FFNBenchmark(shapes=[(8, 16)])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"methods": ["d-countdown"]}, "d-countdown decides neither by one projection"),
        ({"methods": ["teal"]}, "teal decides neither by one projection"),
        ({"sparsities": [1.1]}, r"expected 0 ≤ sparsity ≤ 1"),
        ({"tokens": [9]}, "expected 1 to 8"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        FFNBenchmark(shapes=[(8, 16)], **settings)


def test_decode_records(device, monkeypatch):
    monkeypatch.setattr(arm, "PREFILL", {"cpu": 16})
    monkeypatch.setattr(decode, "CALIBRATION", (2, 64))
    model = llama()
    what = decode.DecodeBenchmark(context=8, new_tokens=4)
    methods = [method("m-countdown", sparsity=0.6), method("d-proxy", sparsity=0.6)]
    dense, sparse, proxied = decode.run(model, methods, what)
    assert proxied["method"] == "d-proxy"
    assert not sparse_modules(model)
    assert (dense["run"], sparse["run"]) == ("dense", "sparse")
    assert sparse["realised_sparsity"] == pytest.approx(0.6, abs=0.1)
    assert sparse["floor_us"] < dense["floor_us"]
    assert dense["speedup"] == 1
    for record in (dense, sparse):
        assert sum(record["split_us"].values()) == pytest.approx(record["time_us"])
        assert record["tokens_per_s"] == pytest.approx(1e6 / record["time_us"])
    assert sparse["backend"] == ("reference" if library.missing() else "cpu")
    assert sparse["weights_read"] == pytest.approx((1 + 2 * (1 - sparse["realised_sparsity"])) / 3)


def test_a_ratio_is_of_what_was_measured_in_the_same_round():
    # A machine that runs half as fast from the third round on, and once stalls.
    pace = iter([1, 1, 2, 2, 9, 2])
    log = []

    def slow():
        log.append("slow")
        runs.now = next(pace)
        return 3.0 * runs.now

    def fast():
        log.append("fast")
        return 1.0 * runs.now

    runs = SimpleNamespace(now=0)
    found = in_turn({"slow": slow, "fast": fast}, rounds=5, warm_up=1)
    assert log == ["slow", "fast"] * 6
    assert found["slow"] == [3, 6, 6, 27, 6]
    assert paired_ratio(found["slow"], found["fast"]) == 3


def test_generate_is_timed_after_it_compiled(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    seconds = iter([90, 40, 3, 1, 2])
    monkeypatch.setattr(decode.time, "perf_counter", lambda: clock.now)

    def generate(*_, **__):
        clock.now += next(seconds)

    model = SimpleNamespace(generate=generate)
    assert decode._generate(model, torch.zeros(1, 4, dtype=torch.int64), 8) == 4


@pytest.mark.parametrize("name", ["m-countdown", "cats", "d-proxy"])
def test_no_neuron_stands_at_a_threshold_where_rounding_would_decide(device, name, monkeypatch):
    monkeypatch.setattr(ffn, "_sizes", lambda _: (10**6, 10**9))
    benchmark = FFNBenchmark(shapes=[(64, 2048)], sparsities=(0.9,), device=torch.device("cpu"))
    layers = ffn._Layers(64, 2048, benchmark)
    case = ffn._Deciding(layers, name, 0.9, layers.inputs(1, 0.9))
    for layer, thresholds in enumerate(case.thresholds):
        rounded = case._value(layer)
        assert not (rounded == thresholds[0]).any()
        for change in (-1e-5, 1e-5):
            assert torch.equal(case._value(layer, 1 + change) > thresholds[0], rounded > thresholds[0])
        assert float((rounded <= thresholds[0]).float().mean()) == pytest.approx(0.9, abs=0.01)


def test_arms_take_turns_on_a_cpu(device, monkeypatch):
    monkeypatch.setattr(arm, "PREFILL", {"cpu": 16})
    monkeypatch.setattr(decode, "CALIBRATION", (2, 64))
    ran = []
    tokens = decode.Arm.runs

    def watched(self):
        found = tokens(self)
        run = found[arm.TOKEN]
        return found | {arm.TOKEN: lambda: (ran.append(bool(sparse_modules(self.model))), run())[1]}

    monkeypatch.setattr(decode.Arm, "runs", watched)
    list(decode.run(llama(), [method("cats")], decode.DecodeBenchmark(context=8, new_tokens=4)))
    assert ran == [False, True] * (arm.WARM_UP + arm.ROUNDS)


def test_all_arms_measure_one_thing_before_the_next():
    ran = []

    class Two:
        def __init__(self, name, *whats):
            self.name, self.whats = name, whats

        def runs(self):
            return {what: lambda what=what: ran.append((self.name, what)) or 1.0 for what in self.whats}

    times, rates = arm.measure({"one": Two("one", "token", "prompt"), "other": Two("other", "token")})
    assert ran[:3] == [("one", "token"), ("other", "token"), ("one", "prompt")]
    assert {name: list(found) for name, found in times.items()} == {"one": ["token", "prompt"], "other": ["token"]}
    assert rates == []


def test_the_tokens_of_the_loop_are_counted_and_no_others(device, llama_model, tokenizer, text):
    cats = method("cats", sparsity=0.5)
    profile = countdown.calibrate(llama_model, tokenizer, text, cats, tokens=512, progress=False)
    countdown.sparsify_(llama_model, profile)
    with torch.no_grad():
        llama_model(torch.tensor([[7]]))
    one = decode.Arm(llama_model, torch.tensor([[5, 17, 90]]), 16, split=True)
    times, _ = arm.measure({"one": one})
    assert set(times["one"]) == {arm.TOKEN, "ffn", "attention_linears", "head"}
    # The first comes with the prompt, which is dense.
    assert {site.tokens for site in countdown.status(llama_model)} == {arm.tokens_of(16) - 1}


def test_decode_takes_any_site(device, monkeypatch):
    monkeypatch.setattr(arm, "PREFILL", {"cpu": 16})
    monkeypatch.setattr(decode, "CALIBRATION", (2, 64))
    what = decode.DecodeBenchmark(context=8, new_tokens=4)
    dense, sparse = decode.run(llama(), [method("teal", sparsity=0.6)], what)
    assert dense["split_us"]
    assert sparse["split_us"] == {}
    assert sparse["weights_read"] == pytest.approx(1 - sparse["realised_sparsity"])
    assert sparse["floor_us"] < dense["floor_us"]
