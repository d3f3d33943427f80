"""The benchmarks on a CPU that stands in for a GPU: what they check and record, not how fast anything is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

import countdown
import countdown.benchmark.arm as arm
import countdown.benchmark.decode as decode
import countdown.benchmark.ffn as ffn
import countdown.benchmark.timing as timing
import countdown.replay as replay
from countdown.benchmark.ffn import FFNBenchmark
from countdown.benchmark.speedup import paired
from countdown.benchmark.timing import Rounds, in_turn, relative_error
from countdown.cli import printing
from countdown.compensation.affine import Affine
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


def test_what_is_predicted_is_checked_and_its_bytes_counted(device, monkeypatch):
    names = ["d-proxy", "d-proxy:compensate=affine"]
    benchmark = FFNBenchmark(shapes=[(64, 96)], methods=names, sparsities=[0.5], dtype="float32")
    plain, predicting = ffn.run(benchmark, progress=False)
    assert (plain["method"], plain["compensate"]) == ("d-proxy", "")
    assert (predicting["method"], predicting["compensate"]) == ("d-proxy", "affine")
    assert predicting["error"] < 1e-5
    matrices = predicting["weights_read"] - plain["weights_read"]
    assert matrices * 3 * 64 * 96 * 4 == pytest.approx(Affine.bytes_of(64, 64))
    monkeypatch.setattr(Affine, "added", lambda x, *_: torch.zeros_like(x))
    _, wrong = ffn.run(benchmark, progress=False)
    assert wrong["error"] > 0.1
    assert "time_us" not in wrong


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
        ({"methods": ["chess"]}, "'chess' is more than a method with compensate or second_look"),
        ({"methods": ["d-proxy:bits=3"]}, "'d-proxy:bits=3' is more than a method with compensate or second_look"),
        ({"methods": ["cats:decision=topk"]}, "'cats:decision=topk' is more than a method"),
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
    found = in_turn({"slow": slow, "fast": fast}, Rounds(5, 5), warm_up=1)
    assert log == ["slow", "fast"] * 6
    assert found["slow"] == [3, 6, 6, 27, 6]
    assert paired(found["slow"], found["fast"]).value == pytest.approx(3)


def test_rounds_are_added_until_it_is_known_or_the_limit_is_reached(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def run():
        clock.now += 1
        return clock.now

    def counted(rounds, enough):
        return len(in_turn({"one": run}, rounds, warm_up=2, enough=enough)["one"])

    assert counted(Rounds(8, 40), lambda _: True) == 8
    assert counted(Rounds(8, 40), lambda found: len(found["one"]) >= 20) == 24
    assert counted(Rounds(8, 36), lambda _: False) == 36
    assert counted(Rounds(8, 40, most_s=15.0), lambda _: False) == 16  # after 10 s, and not after 18
    clock.now = 0.0
    assert in_turn({"one": run}, Rounds(2, 3), warm_up=1, enough=lambda _: False) == {"one": [2, 3, 4]}


class Fake:
    """An arm whose tokens take the times it is given, over and over."""

    def __init__(self, *times):
        self.times = itertools.cycle(times)

    def runs(self):
        return {arm.TOKEN: lambda: float(next(self.times))}


def test_arms_are_timed_until_each_is_told_from_the_first():
    steady, quiet = Fake(10), Fake(8, 8.1)
    times, _ = arm.measure({"dense": steady, "one": quiet}, rounds=Rounds(8, 40))
    assert len(times["one"][arm.TOKEN]) == 8
    times, _ = arm.measure({"dense": steady, "one": quiet, "other": Fake(5, 9, 14, 6, 11)}, rounds=Rounds(8, 40))
    assert {len(found[arm.TOKEN]) for found in times.values()} == {40}


def test_parts_are_timed_without_the_library(monkeypatch):
    for where in (library, replay):
        monkeypatch.setattr(where, "missing", lambda: "no compiler")
    one = decode.Arm(llama(), torch.tensor([[5, 17, 90]]), 16, split=True)
    assert next(one.model.parameters()).requires_grad  # as models are loaded
    times, _ = arm.measure({"dense": one}, rounds=Rounds(6, 6))
    assert set(times["dense"]) == {arm.TOKEN, "ffn", "attention_linears", "head"}


def test_tokens_a_second_and_speed_up_agree():
    found = arm.speeds([8.0, 8.0, 16.0, 8.0, 9.0, 8.0], dense=[10.0, 10.0, 21.0, 30.0, 10.0, 10.0])
    assert found["tokens_per_s"] == pytest.approx(1e6 / 8)
    assert found["dense_tokens_per_s"] * found["speedup"] == pytest.approx(found["tokens_per_s"])
    assert found["speedup_low"] <= found["speedup"] <= found["speedup_high"]


def test_parts_are_shares_of_their_own_round():
    # The machine runs three times as slow in the second round, when nothing else changed.
    parts = arm._split({arm.TOKEN: [100.0, 300.0, 100.0], "ffn": [50.0, 150.0, 50.0], arm.PROMPT: [9.0, 9.0, 9.0]})
    assert parts == {"ffn": pytest.approx(50.0), "rest": pytest.approx(50.0)}


def test_parts_that_come_to_more_than_the_token_are_not_told():
    assert arm._split({arm.TOKEN: [100.0] * 3, "ffn": [90.0, 95.0, 3e5], "head": [8.0, 8.0, 8.0]}) == {}


def test_a_benchmark_prints_no_impossible_number(capsys):
    record = {
        "run": "sparse", "method": "cats", "tokens_per_s": 100.0, "dense_tokens_per_s": 7.0, "speedup": 14.38,
        "speedup_low": 14.0, "speedup_high": 15.0, "ceiling": 1.25, "floor_share": 0.5, "split_us": {},
        "prefill_ms": 3.0, "realised_sparsity": 0.5, "backend": "cpu",
    }  # fmt: skip
    printing.print_decode_speeds(printing.table_console(None), [record | decode._doubted(record)])
    out = capsys.readouterr().out
    assert " 14.38 " not in out.splitlines()[1]
    assert "unreliable" in out.splitlines()[1]
    assert "its speed-up is unreliable: 14.38 times dense was measured (95%: 14.00 to 15.00), and its bytes" in out


def test_where_there_is_no_room_for_more_tokens_it_begins_again(llama_model, tokenizer, text):
    cats = method("cats", sparsity=0.5)
    profile = countdown.calibrate(llama_model, tokenizer, text, cats, tokens=512, progress=False)
    countdown.sparsify_(llama_model, profile)
    one = decode.Arm(llama_model, torch.tensor([[5, 17, 90]]), 16)
    times, _ = arm.measure({"dense": Fake(3, 50, 1, 9), "one": one}, rounds=Rounds(8, 24))
    assert len(times["one"][arm.TOKEN]) == 24
    # A round is a token that wakes the threads and two that are timed; prompts count nowhere.
    assert {site.tokens for site in countdown.status(llama_model)} == {(1 + 24) * (1 + 2)}


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
    case = ffn._Deciding(layers, method(name), 0.9, layers.inputs(1, 0.9))
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
    # As many rounds as it takes.
    assert ran == [False, True] * (len(ran) // 2)
    assert len(ran) >= 2 * (arm.WARM_UP + arm.ROUNDS)


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
