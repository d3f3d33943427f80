"""Sparse linears against dense ones, with random weights: those of a block of Llama-3.1-8B, and all of them in a row.

python benchmarks/linears.py --output benchmarks/results/linears-NAME.json

One token. Linears that read the same input are a group: one launch on a GPU. Dense they are each a product of cuBLAS,
and `fused` one product of their weights put together; on a CPU the dense kernel of the decode loop. Every arm is timed
in turn, captured or recorded, over as many copies of the weights as do not fit the cache. What computes wrong is not
timed. The floor is the bytes of active channels at the memory's bandwidth, and of a low rank that stands for the
others: `--alpha` adds R-Sparse, its factors random ones of the rank that it would have.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.benchmark.speedup import paired
from countdown.benchmark.timing import Rounds, floor_rate, in_turn, relative_error, timed
from countdown.compensation import kept, rank
from countdown.compensation.svd import DroppedSvd
from countdown.ops import backends  # noqa: F401  (registers the ops)
from countdown.replay import recorded
from countdown.results import meta, write
from countdown.sums.linear import Linear
from countdown.weights import Plain
from documents import commit, said

GROUPS = {
    "q, k, v": (4096, [4096, 1024, 1024]),
    "o": (4096, [4096]),
    "gate, up": (4096, [14336, 14336]),
    "down": (14336, [4096]),
}
BLOCK, ATTENTION = "all seven", "q, k, v and o"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
RATE = "bytes/s"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sparsity", type=float, action="append")
    parser.add_argument("--alpha", type=float, action="append", help="of R-Sparse; 1 for none")
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="these groups, and no row of all")
    parser.add_argument("--threads", type=int, action="append", help="on a CPU")
    parser.add_argument("--copies", type=int, help="of the weights")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    groups = {name: made(*GROUPS[name], arguments) for name in arguments.group or GROUPS}
    records = []
    for threads in arguments.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        records += measured(groups, arguments)
    command = shlex.join(["python", "benchmarks/linears.py", *said(sys.argv[1:])])
    header = meta(command, commit=arguments.commit or commit())
    write(arguments.output, {"meta": header, "records": records})


# Sparsity and α.
Form = tuple[float, float]
# A threshold [d], and by copy and linear the factors of a low rank.
Prepared = tuple[Tensor, list[list[list[Tensor]]]]


class Group:
    """Copies of linears that read one input, their weights by input channel and in rows."""

    def __init__(self, d: int, heights: list[int], copies: int, dtype: torch.dtype, device: str) -> None:
        self.d, self.heights, self.copies = d, heights, copies
        self.x = torch.randn(1, d, device=device).to(dtype)
        # In rows they are views of one matrix, which `fused` takes whole.
        self.whole = [(torch.randn(sum(heights), d, device=device) / d**0.5).to(dtype) for _ in range(copies)]
        self.rows = [list(whole.split(heights)) for whole in self.whole]
        self.channels = [[weight.t().contiguous().t() for weight in rows] for rows in self.rows]
        self.counters = [torch.zeros(2, dtype=torch.int64, device=device) for _ in heights]

    @property
    def nbytes(self) -> int:
        return int(self.whole[0].nbytes)

    def bytes_read(self, form: Form) -> float:
        """Of active channels, and of the factors of low ranks at the others."""
        share = kept(self.d, *form) / self.d
        ranks = [rank(self.d, height, *form) for height in self.heights]
        low = sum(r * (self.d * (1 - share) + height) for r, height in zip(ranks, self.heights, strict=True))
        return self.nbytes * share + low * self.x.element_size()

    def prepare(self, form: Form) -> Prepared:
        """Return the threshold that keeps so many channels, and the factors of each copy's linears."""
        threshold = self.x.float().abs().quantile(1 - kept(self.d, *form) / self.d).expand(self.d).contiguous()
        return threshold, [[self.factors(height, form) for height in self.heights] for _ in range(self.copies)]

    def factors(self, height: int, form: Form) -> list[Tensor]:
        """Return random B, laid out by channel, and A; none for α = 1."""
        if form[1] == 1:
            return []
        size = rank(self.d, height, *form)
        inner, outer = torch.randn(size, self.d).to(self.x), torch.randn(height, size).to(self.x)
        like = Linear([Plain([self.x.expand(height, self.d)])], [None])
        made = DroppedSvd(*form).fitted(like, [Plain([inner / self.d**0.5]), Plain([outer / size**0.5])])
        return [part.values() for part in made]

    def dense(self, copy: int) -> object:
        if self.x.is_cuda:
            return [F.linear(self.x, weight) for weight in self.rows[copy]]
        return torch.ops.countdown.project(self.x, self.rows[copy], [None] * len(self.heights))

    def fused(self, copy: int) -> Tensor:
        return F.linear(self.x, self.whole[copy])

    def sparse(self, copy: int, prepared: Prepared) -> object:
        count, by = len(self.heights), {"selector": "input", "rule": "threshold"}
        threshold, factors = prepared[0], prepared[1][copy]
        weights = [[weight, *low] for weight, low in zip(self.channels[copy], factors, strict=True)]
        by["compensation"] = "svd" if factors[0] else ""
        if self.x.is_cuda:
            return torch.ops.countdown.sparse_together(
                self.x, [part for some in weights for part in some], [None] * count, [threshold] * count, self.counters,
                formats=["plain"] * sum(map(len, weights)), drops=[self.d // 2] * count, **by,
            )  # fmt: skip
        return [
            torch.ops.countdown.sparse(
                self.x, some, [None], threshold, counters, None,
                kind="linear", formats=["plain"] * len(some), activation="", drop=self.d // 2, **by,
            )
            for some, counters in zip(weights, self.counters, strict=True)
        ]  # fmt: skip

    def error(self, prepared: Prepared) -> float:
        """How far `sparse` is from float64."""
        small = self.x.float().abs() <= prepared[0]
        expected = torch.where(small, 0, self.x).double() @ self.whole[0].double().T
        if prepared[1][0][0]:
            dropped = torch.where(small, self.x, 0).double()
            low = [dropped @ inner.double().T @ outer.double().T for inner, outer in prepared[1][0]]
            expected = expected + torch.cat(low, dim=-1)
        found = self.sparse(0, prepared)
        y = found if isinstance(found, Tensor) else torch.cat(found, dim=-1)  # type: ignore[arg-type]
        return relative_error(y, expected)


def made(d: int, heights: list[int], arguments: argparse.Namespace) -> Group:
    """Return a group with as many copies as do not fit the cache."""
    cuda = arguments.device.startswith("cuda")
    # Beyond what an L2 of 50 MB, or a third-level cache of 32 MB, keeps.
    copies = arguments.copies or math.ceil((1000 if cuda else 150) * 1e6 / (2 * d * sum(heights)))
    return Group(d, heights, copies, getattr(torch, arguments.dtype), arguments.device)


def measured(groups: dict[str, Group], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a record for each group, sparsity and for the groups in a row."""
    device = torch.device(arguments.device)
    cases = {name: [group] for name, group in groups.items()}
    if not arguments.group:
        cases |= {ATTENTION: [groups["q, k, v"], groups["o"]], BLOCK: list(groups.values())}
    steps: dict[Any, Callable[[], object]] = {}
    errors: dict[Any, float] = {}
    for name, some in cases.items():
        steps[name, "dense"] = over(some, lambda group, copy: group.dense(copy))
        if device.type == "cuda":
            steps[name, "fused"] = over(some, lambda group, copy: group.fused(copy))
        for form in forms(arguments):
            prepared = {id(group): group.prepare(form) for group in some}
            errors[name, form] = max(group.error(prepared[id(group)]) for group in some)
            if errors[name, form] <= TOLERANCE[some[0].x.dtype]:
                steps[name, form] = over(some, partial(sparse, prepared))
    ready = {key: step if device.type == "cuda" else recorded(step, everything=True) for key, step in steps.items()}
    runs = {RATE: floor_rate(device), **{key: timed(step, device) for key, step in ready.items()}}
    found = in_turn(runs, Rounds(arguments.rounds, arguments.rounds), label="measuring")
    rate = statistics.median(found.pop(RATE))
    return [record(name, some, form, found, errors, rate) for name, some in cases.items() for form in forms(arguments)]


def forms(arguments: argparse.Namespace) -> list[Form]:
    """Return what is measured."""
    return [(sparsity, alpha) for alpha in arguments.alpha or [1.0] for sparsity in arguments.sparsity or (0.4, 0.5)]


def sparse(prepared: dict[int, Prepared], group: Group, copy: int) -> object:
    """A group's linears, with what is its own among these."""
    return group.sparse(copy, prepared[id(group)])


def over(groups: list[Group], step: Callable[[Group, int], object]) -> Callable[[], None]:
    """Return a step over copies of groups, as many as the one that has fewest, one block after the other."""

    def run() -> None:
        for copy in range(min(group.copies for group in groups)):
            for group in groups:
                step(group, copy)

    return run


def record(
    name: str, groups: list[Group], form: Form, times: dict[Any, list[float]], errors: dict[Any, float],
    rate: float,
) -> dict[str, Any]:  # fmt: skip
    """Return what was measured of a case, in µs a copy."""
    copies = min(group.copies for group in groups)
    found: dict[str, Any] = {
        "linears": name,
        "shapes": [[group.d, *group.heights] for group in groups],
        "sparsity": form[0],
        "alpha": form[1],
        "dtype": str(groups[0].x.dtype).removeprefix("torch."),
        "copies": copies,
        "threads": torch.get_num_threads(),
        "bytes_s": rate,
        "error": errors[name, form],
        "floor_us": sum(group.bytes_read(form) for group in groups) / rate * 1e6,
    }
    if (name, form) in times:
        found["sparse_us"] = statistics.median(times[name, form]) / copies
        found["over_floor"] = found["sparse_us"] / found["floor_us"]
    for arm in ("dense", "fused"):
        if (name, arm) in times:
            found[f"{arm}_us"] = statistics.median(times[name, arm]) / copies
            if (name, form) in times:
                found[f"speedup_over_{arm}"] = paired(times[name, arm], times[name, form]).value
    print(
        {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}, file=sys.stderr
    )
    return found


if __name__ == "__main__":
    main()
