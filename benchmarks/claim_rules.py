"""What a published claim is judged by: rules that make a verdict of measured figures.

Nothing here measures, or loads torch: `claims.py` says which claims there are, `claim_figures.py` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

REPRODUCED = "reproduced"
IN_PART = "in part"
REFUTED = "not on this model"
SLOWER = "not on this hardware"
UNDECIDED = "undecided"
UNMEASURED = "not measured"
UNTESTABLE = "not testable here"
# From what speaks most for a claim of loss to what speaks most against it.
ORDER = (REPRODUCED, UNDECIDED, UNMEASURED, REFUTED)
ALONE = "perplexity alone"
# Settings that have a name of their own.
ALIASES = {("teal", "shared-norm"): "wina"}


@dataclass(frozen=True)
class Evidence:
    """A record of a results file, and the name and hardware of that file."""

    source: str
    hardware: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What figures say of a claim.

    Args:
        word: One of the constants above.
        figures: The figures, as a table shows them; may be none.
        note: What the word leaves open, such as that it rests on perplexity.
    """

    word: str
    figures: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.note})" if self.note else self.word


@dataclass(frozen=True)
class Arm:
    """A method and its settings: what is measured for a claim. A recipe's name does as well."""

    method: str
    sparsity: float
    weighting: str = "none"
    decision: str = "threshold"
    allocation: str = "uniform"
    alpha: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All but the sparsity, as `countdown.method` takes them; recipes have weightings of their own."""
        found: dict[str, Any] = {"decision": self.decision}
        if self.weighting != "none":
            found["weighting"] = self.weighting
        if self.allocation != "uniform":
            found["allocation"] = self.allocation
        if self.alpha is not None:
            found["alpha"] = self.alpha
        return found

    @property
    def label(self) -> str:
        """What a record of it is called; no two arms share one."""
        weighting = "" if self.weighting == "none" else f" × {self.weighting}"
        name = ALIASES.get((self.method, self.weighting), self.method + weighting)
        more = [self.decision] if self.decision != "threshold" else []
        more += [self.allocation] if self.allocation != "uniform" else []
        more += [f"α {self.alpha:g}"] if self.alpha is not None else []
        return ", ".join([f"{name} {self.sparsity:.0%}", *more])

    def fits(self, record: dict[str, Any]) -> bool:
        """Return whether a record is of this arm: by its label, or in files without labels by the settings."""
        if "arm" in record:
            return bool(record["arm"] == self.label)
        settings = {"weighting": "none", "allocation": "uniform", "alpha": None, "dithered": False, "pattern": None}
        wanted = settings | {"method": self.method, "sparsity": self.sparsity} | self.settings
        return all(record.get(key, settings.get(key)) == value for key, value in wanted.items())


class Rule(Protocol):
    """How a claim is judged."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What must be measured on a model."""

    def verdict(self, evidence: Sequence[Evidence]) -> Verdict:
        """Judge by what was measured."""


@dataclass(frozen=True)
class Loss:
    """Arms lose at most `bound`, as a share: of accuracy on tasks, or where `of` says so of perplexity.

    Where the claim is of accuracy and no task was scored, perplexity is shown and decides nothing: how much of one is
    how much of the other differs from model to model.

    Args:
        each: Every arm must, not just the best.
    """

    arms: tuple[Arm, ...]
    bound: float
    of: str = "accuracy"
    each: bool = True

    def verdict(self, evidence: Sequence[Evidence]) -> Verdict:
        words = [self._word(arm, evidence) for arm in self.arms]
        figures = tuple(figure for arm in self.arms for figure in _shown(arm, evidence))
        read, scored = (any(found(arm, evidence) for arm in self.arms) for found in (text, tasks))
        note = ALONE if read and self.of == "accuracy" and not scored else ""
        return Verdict(_all(words) if self.each else min(words, key=ORDER.index), figures, note)

    def _word(self, arm: Arm, evidence: Sequence[Evidence]) -> str:
        scores, read = tasks(arm, evidence), text(arm, evidence)
        if self.of == "accuracy" and scores:
            loss, margin = lost(scores)
            return within(loss, margin, self.bound)
        if read is None:
            return UNMEASURED
        return UNDECIDED if self.of == "accuracy" else within(risen(read), 0.0, self.bound)


@dataclass(frozen=True)
class Better:
    """In each pair the first keeps more than the second, and somewhere by the share `by` of its accuracy.

    Without tasks, perplexity tells which of two is better, and not by how much of an accuracy. Pairs that were not
    measured might be where the first is better, or where it is not.
    """

    pairs: tuple[tuple[Arm, Arm], ...]
    by: float = 0.0

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(arm for pair in self.pairs for arm in pair)

    def verdict(self, evidence: Sequence[Evidence]) -> Verdict:
        scored = [gain for pair in self.pairs if (gain := gained(pair, evidence)) is not None]
        read = [gain for pair in self.pairs if (gain := lowered(pair, evidence)) is not None]
        figures = tuple(figure for arm in dict.fromkeys(self.arms) for figure in _shown(arm, evidence))
        return Verdict(self._word(scored or read, bool(scored)), figures, ALONE if read and not scored else "")

    def _word(self, gains: list[float], scored: bool) -> str:
        if not gains:
            return UNMEASURED
        complete = len(gains) == len(self.pairs)
        if max(gains) <= 0:
            return REFUTED if complete else UNDECIDED
        enough = max(gains) >= self.by and (scored or not self.by)
        return REPRODUCED if complete and min(gains) > 0 and enough else IN_PART


@dataclass(frozen=True)
class Speed:
    """A ratio over dense: the key of a record with these fields; `recipe` is a field of names and sparsities."""

    key: str
    fields: tuple[tuple[str, Any], ...]

    def found(self, evidence: Sequence[Evidence]) -> Evidence | None:
        """Return the first record that has it."""
        for one in evidence:
            if self.key in one.record and all(_field(one.record, name) == value for name, value in self.fields):
                return one
        return None


def _field(record: dict[str, Any], name: str) -> Any:
    found = record.get(name)
    if name == "recipe" and found is not None:
        return tuple((entry["name"], entry["sparsity"]) for entry in found)
    return found


@dataclass(frozen=True)
class Faster:
    """Decoding is so many times as fast; where only a part of a token was timed, that part.

    The rest of a token gains nothing, so a part that gains less refutes the claim, and one that gains enough leaves
    the whole open.
    """

    bound: float
    whole: Speed
    part: Speed | None = None

    @property
    def arms(self) -> tuple[Arm, ...]:
        return ()

    def verdict(self, evidence: Sequence[Evidence]) -> Verdict:
        whole = self.whole.found(evidence)
        part = self.part.found(evidence) if self.part else None
        if whole is not None:
            ratio = whole.record[self.whole.key]
            return Verdict(REPRODUCED if ratio >= self.bound else SLOWER, (_ratio("a token", ratio, whole),))
        if self.part is None or part is None:
            return Verdict(UNMEASURED)
        ratio = part.record[self.part.key]
        what = "linears alone" if "linears" in part.record else "an FFN alone"
        word = IN_PART if ratio >= self.bound else SLOWER
        return Verdict(word, (_ratio(what, ratio, part),), "a part of a token")


@dataclass(frozen=True)
class Untestable:
    """Nothing here can tell."""

    why: str

    @property
    def arms(self) -> tuple[Arm, ...]:
        return ()

    def verdict(self, evidence: Sequence[Evidence]) -> Verdict:
        return Verdict(UNTESTABLE, (), self.why)


def within(loss: float, margin: float, bound: float) -> str:
    """Return whether a loss keeps a bound, given the half-width of its interval."""
    if loss + margin <= bound:
        return REPRODUCED
    return REFUTED if loss - margin > bound else UNDECIDED


def text(arm: Arm, evidence: Sequence[Evidence]) -> Evidence | None:
    """Return the perplexity of an arm."""
    return next((one for one in evidence if "perplexity" in one.record and arm.fits(one.record)), None)


def tasks(arm: Arm, evidence: Sequence[Evidence]) -> list[Evidence]:
    """Return the scores of an arm in the first file that has any: of each task `acc`, or else its first metric."""
    scores = [one for one in evidence if "task" in one.record and "sparse" in one.record and arm.fits(one.record)]
    found: dict[str, Evidence] = {}
    for one in (one for one in scores if one.source == scores[0].source):
        if one.record["task"] not in found or one.record["metric"] == "acc":
            found[one.record["task"]] = one
    return list(found.values())


def lost(scores: Sequence[Evidence]) -> tuple[float, float]:
    """Return which share of the dense mean over tasks is lost, and the half-width of its interval at 95%."""
    records = [one.record for one in scores]
    dense = fmean(record["dense"] for record in records)
    halves = [(record["high"] - record["low"]) / 2 if record["low"] is not None else 0.0 for record in records]
    margin = math.hypot(*halves) / len(records)
    return 1 - fmean(record["sparse"] for record in records) / dense, margin / dense


def risen(read: Evidence) -> float:
    """Return by which share perplexity is above the dense model's."""
    return float(read.record["perplexity"] / read.record["dense_perplexity"]) - 1


def gained(pair: tuple[Arm, Arm], evidence: Sequence[Evidence]) -> float | None:
    """Return by which share the first's accuracy is above the second's, on the same tasks of one file."""
    ours, theirs = (tasks(arm, evidence) for arm in pair)
    names = [[(one.source, one.record["task"]) for one in scores] for scores in (ours, theirs)]
    if not ours or names[0] != names[1]:
        return None
    return fmean(one.record["sparse"] for one in ours) / fmean(one.record["sparse"] for one in theirs) - 1


def lowered(pair: tuple[Arm, Arm], evidence: Sequence[Evidence]) -> float | None:
    """Return by which share the first's perplexity is below the second's, in one file."""
    ours, theirs = (text(arm, evidence) for arm in pair)
    if ours is None or theirs is None or ours.source != theirs.source:
        return None
    return 1 - float(ours.record["perplexity"] / theirs.record["perplexity"])


def _all(words: Sequence[str]) -> str:
    """Return what a claim of every arm comes to."""
    if REPRODUCED in words and REFUTED in words:
        return IN_PART
    return max(words, key=ORDER.index)


def _shown(arm: Arm, evidence: Sequence[Evidence]) -> list[str]:
    """Return an arm's figures against dense in a line, or why it has none."""
    scores, read = tasks(arm, evidence), text(arm, evidence)
    shown = [] if read is None else [_perplexity(read)]
    if scores:
        loss, margin = lost(scores)
        shown.append(f"{', '.join(one.record['task'] for one in scores)} {-loss:+.1%} ± {margin:.1%}")
    if not shown:
        shown = [one.record["error"] for one in evidence if "error" in one.record and arm.fits(one.record)]
    return [f"{arm.label}: {'; '.join(shown)}"] if shown else []


def _perplexity(read: Evidence) -> str:
    rise, record = risen(read), read.record
    change = f"{rise:+.1%}" if rise < 1 else f"× {1 + rise:.1f}"
    return f"perplexity {record['dense_perplexity']:.1f} → {record['perplexity']:.1f} ({change})"


def _ratio(what: str, ratio: float, found: Evidence) -> str:
    apart = found.record.get("speedup_over_dense")  # of linears, where the ratio is over fused ones
    against = "dense" if apart is None else f"fused, {apart:.2f} × separate dense ones"
    return f"{what}: {ratio:.2f} × {against}; {found.hardware}"
