"""benchmarks/claims.py: verdicts on made-up figures, what every claim must say, and a tiny model measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

# Last: nothing there may hide a module of the same name.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import claim_figures
import claims
from claim_rules import Arm, Better, Evidence, Faster, Loss, Speed, Untestable, within
from countdown.profiles.recipe import Recipe

OURS, THEIRS = Arm("m-countdown", 0.7), Arm("cats", 0.7)
MORE = Arm("m-countdown", 0.9), Arm("cats", 0.9)
FACTOR = Speed("speedup", (("run", "sparse"), ("method", "cats")))
PART = Speed("speedup_over_fused", (("linears", "all seven"),))


def read(arm: Arm, perplexity: float, source: str = "text") -> Evidence:
    return Evidence(source, "CPU", {"arm": arm.label, "perplexity": perplexity, "dense_perplexity": 100.0})


def score(
    arm: Arm, sparse: float, margin: float | None = 0.0, task: str = "piqa", metric: str = "acc", source: str = "tasks"
) -> Evidence:
    """A dense model scores 0.5."""
    low, high = (None, None) if margin is None else (sparse - 0.5 - margin, sparse - 0.5 + margin)
    record = {
        "arm": arm.label,
        "task": task,
        "metric": metric,
        "dense": 0.5,
        "sparse": sparse,
        "low": low,
        "high": high,
    }
    return Evidence(source, "CPU", record)


def timed(key: str, value: float, **fields: Any) -> Evidence:
    return Evidence("speeds", "a GPU", {key: value, **fields})


@pytest.mark.parametrize(
    ("loss", "margin", "word"),
    [
        (0.05, 0.0, "reproduced"),
        (0.04, 0.01, "reproduced"),
        (0.04, 0.02, "undecided"),
        (0.06, 0.02, "undecided"),
        (0.06, 0.005, "not on this model"),
        (-0.2, 0.1, "reproduced"),
    ],
)
def test_a_loss_is_judged_by_its_whole_interval(loss: float, margin: float, word: str):
    assert within(loss, margin, 0.05) == word


@pytest.mark.parametrize(
    ("sparse", "margin", "word"),
    [(0.49, 0.002, "reproduced"), (0.47, 0.02, "undecided"), (0.45, 0.01, "not on this model")],
)
def test_a_loss_of_accuracy_is_relative_to_the_dense_model(sparse: float, margin: float, word: str):
    # 2, 6 and 10% of 0.5.
    assert Loss((OURS,), 0.055).verdict([score(OURS, sparse, margin)]).word == word


def test_perplexity_alone_decides_no_claim_of_accuracy():
    for perplexity in (100.0, 900.0):
        found = Loss((OURS,), 0.055).verdict([read(OURS, perplexity)])
        assert (found.word, found.note) == ("undecided", "perplexity alone")
    assert found.figures == ("m-countdown 70%: perplexity 100.0 → 900.0 (× 9.0)",)


def test_perplexity_decides_a_claim_of_perplexity_whatever_tasks_say():
    rule = Loss((OURS,), 0.01, of="perplexity")
    assert rule.verdict([read(OURS, 100.9), score(OURS, 0.1)]).word == "reproduced"
    assert rule.verdict([read(OURS, 101.1), score(OURS, 0.5)]).word == "not on this model"


@pytest.mark.parametrize(
    ("first", "second", "each", "best"),
    [
        (0.5, 0.5, "reproduced", "reproduced"),
        (0.5, 0.2, "in part", "reproduced"),
        (0.2, 0.2, "not on this model", "not on this model"),
        (0.2, None, "not on this model", "not measured"),
        (0.5, None, "not measured", "reproduced"),
        (None, None, "not measured", "not measured"),
    ],
)
def test_a_claim_of_several_arms_is_of_each_or_of_the_best(
    first: float | None, second: float | None, each: str, best: str
):
    pairs = zip((OURS, THEIRS), (first, second), strict=True)
    evidence = [score(arm, value) for arm, value in pairs if value is not None]
    assert Loss((OURS, THEIRS), 0.05).verdict(evidence).word == each
    assert Loss((OURS, THEIRS), 0.05, each=False).verdict(evidence).word == best


def test_tasks_count_by_acc_and_their_mean_is_surer_than_one():
    both = [score(OURS, 0.48, 0.03), score(OURS, 0.48, 0.03, task="arc_easy")]
    assert claims_figures(both) == ["m-countdown 70%: piqa, arc_easy -4.0% ± 4.2%"]
    normed = [score(OURS, 0.1, metric="acc_norm"), *both, score(OURS, 0.1, metric="acc_norm", task="arc_easy")]
    assert claims_figures(normed) == claims_figures(both)
    # A metric without an interval has no margin.
    assert claims_figures([score(OURS, 0.48, None, metric="exact_match")]) == ["m-countdown 70%: piqa -4.0% ± 0.0%"]


def claims_figures(evidence: list[Evidence]) -> list[str]:
    return list(Loss((OURS,), 0.05).verdict(evidence).figures)


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [((0.4, 0.3), (0.3, 0.2), "reproduced"), ((0.4, 0.3), (0.39, 0.29), "in part"),
     ((0.4, 0.2), (0.3, 0.3), "in part"), ((0.3, 0.2), (0.4, 0.2), "not on this model")],
)  # fmt: skip
def test_of_two_methods_the_better_one_by_accuracy(ours: tuple, theirs: tuple, word: str):
    rule = Better(((OURS, THEIRS), MORE), by=0.294)
    pairs = zip((OURS, MORE[0], THEIRS, MORE[1]), (*ours, *theirs), strict=True)
    assert rule.verdict([score(arm, value) for arm, value in pairs]).word == word


def test_perplexity_tells_which_is_better_and_not_by_how_much_accuracy():
    better = [read(OURS, 110.0), read(THEIRS, 900.0)]
    plain, much = Better(((OURS, THEIRS),)), Better(((OURS, THEIRS),), by=0.294)
    assert str(plain.verdict(better)) == "reproduced (perplexity alone)"
    assert str(much.verdict(better)) == "in part (perplexity alone)"
    assert plain.verdict([read(OURS, 900.0), read(THEIRS, 110.0)]).word == "not on this model"
    assert plain.verdict([*better, score(OURS, 0.3), score(THEIRS, 0.4)]).word == "not on this model"


@pytest.mark.parametrize(("sparse", "word"), [(0.4, "in part"), (0.2, "undecided")])
def test_pairs_that_were_not_measured_leave_a_claim_open(sparse: float, word: str):
    rule = Better(((OURS, THEIRS), MORE))
    assert rule.verdict([score(OURS, sparse), score(THEIRS, 0.3)]).word == word


def test_what_two_files_measured_is_not_compared():
    rule = Better(((OURS, THEIRS),))
    assert rule.verdict([read(OURS, 110.0, "one"), read(THEIRS, 120.0, "other")]).word == "not measured"
    assert rule.verdict([score(OURS, 0.4, source="one"), score(THEIRS, 0.3, source="other")]).word == "not measured"
    assert rule.verdict([score(OURS, 0.4), score(THEIRS, 0.3, task="arc_easy")]).word == "not measured"


@pytest.mark.parametrize(
    ("whole", "part", "verdict"),
    [
        (1.5, 1.1, "reproduced"),
        (1.4, 9.0, "not on this hardware"),
        (None, 1.6, "in part (a part of a token)"),
        (None, 1.4, "not on this hardware (a part of a token)"),
        (None, None, "not measured"),
    ],
)
def test_a_part_of_a_token_refutes_a_speed_but_does_not_prove_it(whole: float | None, part: float | None, verdict: str):
    evidence = [] if whole is None else [timed("speedup", whole, run="sparse", method="cats")]
    evidence += [] if part is None else [timed("speedup_over_fused", part, linears="all seven")]
    assert str(Faster(1.5, FACTOR, PART).verdict(evidence)) == verdict


def test_a_speed_is_of_the_record_with_all_its_fields():
    others = [timed("speedup", 3.0, run="sparse", method="teal"), timed("speedup", 3.0, run="dense", method="cats")]
    assert Faster(1.5, FACTOR).verdict(others).word == "not measured"
    recipe = Speed("speedup", (("recipe", (("cats", 0.5),)),))
    right, wrong = (timed("speedup", 3.0, recipe=[{"name": name, "sparsity": 0.5}]) for name in ("cats", "teal"))
    assert Faster(1.5, recipe).verdict([wrong]).word == "not measured"
    assert Faster(1.5, recipe).verdict([wrong, right]).word == "reproduced"


def test_what_cannot_be_tested_says_why():
    assert str(Untestable("needs other models").verdict([])) == "not testable here (needs other models)"


def test_records_without_a_label_fit_by_their_settings():
    record = {"method": "teal", "sparsity": 0.5, "decision": "threshold", "weighting": "none", "allocation": "greedy"}
    arm = Arm("teal", 0.5, allocation="greedy")
    assert arm.fits(record)
    for other in (
        {"sparsity": 0.4},
        {"weighting": "shared-norm"},
        {"allocation": "uniform"},
        {"decision": "topk"},
        {"dithered": True},
        {"pattern": "*.mlp"},
        {"alpha": 0.9},
    ):
        assert not arm.fits(record | other), other
    assert Arm("teal", 0.5, "shared-norm", allocation="greedy").fits(record | {"weighting": "shared-norm"})


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.id)
def test_every_claim_has_a_source_a_protocol_and_a_command(claim: claims.Claim):
    assert "arXiv" in claim.paper
    assert all((claim.where, claim.says, claim.protocol, claim.here, claim.command))
    if claim.rule.arms:
        assert claim.command == f"python benchmarks/claims.py MODEL --only {claim.id}"
    if isinstance(claim.rule, Faster):
        assert "benchmark decode" in claim.command


def test_ids_and_labels_are_unique_and_arms_are_methods():
    assert len({claim.id for claim in claims.CLAIMS}) == len(claims.CLAIMS)
    assert len({arm.label for arm in claims.arms()}) == len(claims.arms())
    for arm in claims.arms():
        Recipe.named(arm.method, sparsity=arm.sparsity, **arm.settings)


def test_the_tables_have_a_row_for_each_claim():
    figures = [read(arm, 101.0) for arm in claims.arms()]
    lines = claims.rows(claims.CLAIMS, {"tiny": figures, "another": []}).splitlines()
    assert len(lines) == 2 + len(claims.CLAIMS)
    for claim, line in zip(claims.CLAIMS, lines[2:], strict=True):
        cells = line.strip("| ").split(" | ")
        assert cells[0] == f"`{claim.id}`"
        assert claim.says in cells[1]
        assert claim.paper in cells[1]
        assert cells[4].startswith(f"**{claim.rule.verdict(figures)}**")
        assert cells[6] == f"`{claim.command}`"
    docs = claims.quality({"SmolLM2-135M": ["quality-linears-smollm2"]}) + claims.speed()
    assert [docs.count(f"| `{claim.id}` |") for claim in claims.CLAIMS] == [1] * len(claims.CLAIMS)


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("TEXT_DIR", raising=False)
    given = [str(model_folder), "--windows", "1", "--tokens", "1024", "--commit", "abc", "--device", "cpu"]
    return [*given, "--output", str(tmp_path / "claims.json")]


def test_a_model_is_measured_and_its_table_printed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["claims.py", *arguments, "--only", "chess-quality", "griffin-quality"])
    claims.main()
    document = json.loads((tmp_path / "claims.json").read_text())
    assert [record["arm"] for record in document["records"]] == ["chess 50%", "cats 50%", "griffin 50%, topk"]
    assert [record["tokens"] for record in document["records"]] == [511, 511, 255]
    assert all(record["text"] == "python-docs" for record in document["records"])
    assert document["meta"]["commit"] == "abc"
    assert str(tmp_path) not in document["meta"]["command"]
    printed = capsys.readouterr().out
    assert printed.count("| `chess-quality` |") == printed.count("| `griffin-quality` |") == 1
    assert "not measured" not in printed


def test_an_arm_that_a_model_does_not_take_has_its_reason_and_the_others_are_measured(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["claims.py", *arguments])
    bench = claim_figures.Bench.of(claims._arguments())
    refused, taken = Arm("r-sparse", 0.5, alpha=2.0), Arm("d-countdown", 0.5, decision="topk")
    records = list(bench.records([refused, taken]))
    assert "alpha of r-sparse is 2" in records[0]["error"]
    assert records[1]["realised_sparsity"] == pytest.approx(0.5, abs=0.02)
    shown = Loss((refused,), 0.1).verdict([Evidence("here", "CPU", record) for record in records])
    assert shown.word == "not measured"
    assert "alpha of r-sparse is 2" in shown.figures[0]


def test_one_calibration_serves_every_sparsity_of_a_method(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["claims.py", *arguments])
    bench = claim_figures.Bench.of(claims._arguments())
    made = []
    monkeypatch.setattr(type(bench), "calibrated", _counted(type(bench).calibrated, made))
    records = list(bench.records([Arm("cats", s) for s in (0.3, 0.8)] + [Arm("m-countdown", 0.3)]))
    assert made == ["cats 30%", "m-countdown 30%"]
    assert [record["sparsity"] for record in records] == [0.3, 0.8, 0.3]
    assert records[0]["realised_sparsity"] < records[1]["realised_sparsity"]


def _counted(calibrated: Any, made: list[str]) -> Any:
    def counted(self: Any, arm: Arm) -> Any:
        made.append(arm.label)
        return calibrated(self, arm)

    return counted
