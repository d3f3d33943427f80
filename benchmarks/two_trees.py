"""Times the sparse FFN kernels of two source trees in the same rounds, each tree in a process of its own.

python benchmarks/two_trees.py BEFORE AFTER -o benchmarks/results/gpu-house-h100.json

BEFORE and AFTER are checkouts, of which `src` is imported. Before anything is timed, results are compared with float64.
Steps of many layers, whose weights no cache holds, are captured in CUDA graphs; a round goes through all cases and both
trees, in turn which comes first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

D, H = 4096, 14336
METHODS = {"m-countdown": "up", "cats": "gate", "d-proxy": "proxy", "given": "given"}
SPARSITIES = (0.0, 0.5, 0.8, 0.9)
TOKENS = (1, 2, 4, 8)
LAYERS, ROUNDS, REPLAYS = 36, 20, 4


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--commits", nargs=2, default=("", ""))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        serve(arguments.tokens)
        return
    children = [_child(tree, arguments.tokens) for tree in arguments.trees]
    cases = list(product(METHODS, SPARSITIES, arguments.tokens))
    checked = [[_answer(child) for child in children] for _ in cases]
    times: dict[Any, list[list[float]]] = {case: [[], []] for case in cases}
    for turn in range(ROUNDS):
        for place, case in enumerate(cases):
            for which in (0, 1) if turn % 2 else (1, 0):
                times[case][which].append(_ask(children[which], place))
    records = [_record(case, times[case], found) for case, found in zip(cases, checked, strict=True)]
    meta = _meta(arguments.commits) | _ask(children[0], -1)
    for child in children:
        child.terminate()
    text = json.dumps({"meta": meta, "records": records}, indent=1)
    if arguments.output:
        arguments.output.write_text(text)
    for record in records:
        print(
            f"{record['method']:12} {record['sparsity']:4} {record['tokens']}  {record['before_us']:8.2f} "
            f"{record['after_us']:8.2f}  {record['ratio']:.4f}  {'same bits' if record['same_bits'] else 'other bits'}"
        )
    ratios = [record["ratio"] for record in records]
    print(f"median {statistics.median(ratios):.4f}  min {min(ratios):.4f}  max {max(ratios):.4f}")


def _child(tree: Path, tokens: list[int]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(tree.resolve() / "src")}
    command = [sys.executable, __file__, str(tree), "--child", "--tokens", *map(str, tokens)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _answer(child: subprocess.Popen[str]) -> Any:
    line = child.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise SystemExit("a child has ended")
    return json.loads(line)


def _ask(child: subprocess.Popen[str], place: int) -> Any:
    print(place, file=child.stdin, flush=True)
    return _answer(child)


def _record(case: tuple[str, float, int], times: list[list[float]], found: list[dict[str, Any]]) -> dict[str, Any]:
    (before, after), (one, other) = times, found
    ratios = [a / b for a, b in zip(after, before, strict=True)]
    return {
        "d": D, "h": H, "dtype": "bfloat16", "activation": "silu", "layers": LAYERS,
        "method": case[0], "sparsity": case[1], "tokens": case[2],
        "realised_sparsity": other["sparsity"], "before_us": statistics.median(before),
        "after_us": statistics.median(after), "ratio": statistics.median(ratios),
        "before_error": one["error"], "after_error": other["error"], "same_bits": one["bits"] == other["bits"],
    }  # fmt: skip


def _meta(commits: tuple[str, str]) -> dict[str, Any]:
    return {
        "commit": commits[1],
        "before": commits[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/two_trees.py BEFORE AFTER",
        "rounds": ROUNDS,
        "python": platform.python_version(),
    }


# In a child, of the tree that it imports.


def serve(tokens: list[int]) -> None:
    """Check every case and say how far it is off; then time those that are asked for."""
    import torch

    cases = list(product(METHODS, SPARSITIES, tokens))
    layers = _Layers()
    graphs = []
    for case in cases:
        step, found = layers.case(*case)
        print(json.dumps(found), flush=True)
        if not found["error"] <= 1e-2:
            raise SystemExit(f"{case}: {found}")
        graphs.append((_captured(step), step))
    for line in sys.stdin:
        if int(line) < 0:
            import triton

            answer: Any = {
                "hardware": {"gpu": torch.cuda.get_device_name()},
                "versions": {"torch": torch.__version__, "triton": triton.__version__},
            }
        else:
            answer = _time(graphs[int(line)][0]) / LAYERS
        print(json.dumps(answer), flush=True)


def _captured(step: Any) -> Any:
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    started = time.perf_counter()
    while time.perf_counter() - started < 0.05:
        graph.replay()
        torch.cuda.synchronize()
    return graph


def _time(graph: Any) -> float:
    """Return the µs of a replay."""
    import torch

    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) * 1e3)
    return statistics.median(times)


class _Layers:
    """FFNs with random weights, gate and up in one matrix, and proxies of them."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.both = [self.draw(2 * H, D) for _ in range(LAYERS)]
        self.down = [self.draw(H, D).t() for _ in range(LAYERS)]
        self.ops = _Ops(D)
        self.proxies = [self.ops.proxies(self.weights(layer)[:2]) for layer in range(LAYERS)]
        self.counters = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.x = {tokens: self.draw(tokens, D) * D**0.5 for tokens in range(1, 9)}

    def draw(self, *shape: int) -> Any:
        torch = self.torch
        return (torch.randn(shape, device="cuda", generator=self.generator) / shape[-1] ** 0.5).bfloat16()

    def weights(self, layer: int) -> list[Any]:
        return [self.both[layer][:H], self.both[layer][H:], self.down[layer]]

    def indicator(self, layer: int, name: str, x: Any) -> Any:
        torch = self.torch
        gate, up, _ = self.weights(layer)
        if name == "up":
            return (x @ up.t()).abs().float()
        a = torch.nn.functional.silu(x @ gate.t())
        return a.abs().float() if name == "gate" else (a * (x @ up.t())).abs().float()

    def case(self, method: str, sparsity: float, tokens: int) -> tuple[Any, dict[str, Any]]:
        """Return a step through all layers, and its error, bits and sparsity."""
        torch, x, name = self.torch, self.x[tokens], METHODS[method]
        decides = "up" if name == "given" else name
        thresholds = []
        for layer in range(LAYERS):
            values = self.indicator(layer, decides, x).flatten()
            at = values.kthvalue(max(1, int(sparsity * len(values)))).values if sparsity else torch.tensor(-1.0)
            thresholds.append(at.to("cuda").float().expand(H).contiguous())

        def select(layer: int) -> Any:
            return self.ops.select(x, self.weights(layer), thresholds[layer], self.proxies[layer], decides)

        active = select(0)
        if name == "given":
            sets = [select(layer) for layer in range(LAYERS)]
            lists = [self.ops.listed(mask) for mask in sets]

            def run(layer: int) -> Any:
                return self.ops.given(x, self.weights(layer), sets[layer], lists[layer])
        else:

            def run(layer: int) -> Any:
                return self.ops.sparse(
                    x, self.weights(layer), thresholds[layer], self.counters, self.proxies[layer], decides,
                    int(sparsity * H),
                )  # fmt: skip

        y = run(0)
        gate, up, down = (weight.double() for weight in self.weights(0))
        a = torch.nn.functional.silu(x.double() @ gate.t())
        expected = torch.where(active, a * (x.double() @ up.t()), 0) @ down.t()
        found = {
            "error": float((y.double() - expected).norm() / expected.norm()),
            "bits": hashlib.sha256(y.view(torch.int16).cpu().numpy().tobytes()).hexdigest(),
            "sparsity": 1 - float(active.float().mean()),
        }
        return (lambda: [run(layer) for layer in range(LAYERS)]), found


class _Ops:
    """The ops as the imported tree has them: with `ops.schema`, or with `ops.call`."""

    def __init__(self, d: int) -> None:
        import torch

        from countdown.ops import backends  # noqa: F401

        self.torch, self.ops = torch, torch.ops.countdown
        self.old = hasattr(self.ops, "sparse_ffn")
        self.even = torch.ones(d, device="cuda")

    def proxies(self, weights: list[Any]) -> Any:
        if self.old:
            made = [import_module("countdown.ops.proxy").quantise(weight, self.even, 4) for weight in weights]
            return [part for one in made for part in (one.levels, one.scales)]
        from countdown.weights.symmetric import quantise

        return [part for weight in weights for part in quantise(weight, self.even, 4).parts]

    def _form(self, name: str) -> dict[str, Any]:
        copies = ["symmetric-4"] * 2 if name == "proxy" else []
        return {
            "kind": "ffn", "formats": ["plain"] * 3 + copies, "activation": "silu",
            "selector": "proxy-4" if name == "proxy" else name, "rule": "threshold",
        }  # fmt: skip

    def sparse(self, x: Any, weights: Any, thresholds: Any, counters: Any, proxy: Any, name: str, drop: int) -> Any:
        proxy = proxy if name == "proxy" else None
        if self.old:
            return self.ops.sparse_ffn(
                x, weights, [None] * 3, thresholds, counters,
                proxy=proxy, decision="threshold", drop=drop, indicator=name, activation="silu",
            )  # fmt: skip
        return self.ops.sparse(
            x, [*weights, *(proxy or ())], [None] * 3, thresholds, counters, None, **self._form(name), drop=drop
        )

    def select(self, x: Any, weights: Any, thresholds: Any, proxy: Any, name: str) -> Any:
        proxy = proxy if name == "proxy" else None
        if self.old:
            return self.ops.select(
                x, weights, [None] * 3, thresholds,
                proxy=proxy, decision="threshold", drop=0, indicator=name, activation="silu",
            )  # fmt: skip
        return self.ops.select(x, [*weights, *(proxy or ())], [None] * 3, thresholds, None, **self._form(name), drop=0)

    def listed(self, mask: Any) -> Any:
        torch = self.torch
        found = mask[0].nonzero().flatten().int()
        listed = torch.zeros(H, dtype=torch.int32, device="cuda")
        listed[: len(found)] = found
        return listed, torch.tensor([len(found)], dtype=torch.int32, device="cuda")

    def given(self, x: Any, weights: Any, active: Any, listed: Any) -> Any:
        if len(x) == 1 and self.old:
            before = import_module("countdown.ops.triton.ops")
            return before.listed_ffn(x, weights, [None] * 3, *listed, activation="silu")
        if self.old:
            return self.ops.given_ffn(x, weights, [None] * 3, active, activation="silu")
        if len(x) == 1:
            from countdown.ops.triton.ffn import listed_ffn
            from countdown.sums.gated import Gated
            from countdown.weights import Plain

            return listed_ffn(x, Gated([Plain([weight]) for weight in weights], [None] * 3, "silu"), *listed)
        # Before it counted, it took no more than the sets.
        more = (None, None) if "counters" in str(self.ops.given.default._schema) else ()
        form = {"kind": "ffn", "formats": ["plain"] * 3, "activation": "silu"}
        return self.ops.given(x, weights, [None] * 3, active, *more, **form)


if __name__ == "__main__":
    main()
