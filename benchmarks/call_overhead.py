"""What a call of a sparse FFN costs outside of its kernels, on a CPU: Python, torch's dispatcher, checks.

    python benchmarks/call_overhead.py --output benchmarks/results/cpu-call-overhead.json

The FFN is so small that nothing else takes time; the dense module that it replaces, called in turn, costs calls too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from countdown.artifacts import IMPORTANCE
from countdown.methods import method
from countdown.modules import SparseModule
from countdown.phase import GENERATED, Phases
from countdown.results import meta, write
from countdown.sites.gated import GatedFFN
from countdown.sites.holders import Rows
from documents import commit

D, H, ROUNDS, CALLS = 64, 16, 40, 500


def main() -> None:
    """Measure in turns and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=D, intermediate_size=H, num_attention_heads=1)
    dense = LlamaMLP(config).eval().to(torch.bfloat16)
    modules: dict[str, torch.nn.Module] = {"dense": dense}
    modules |= {name: _sparse(dense, name) for name in ("m-countdown", "d-proxy")}
    x = torch.randn(1, 1, D, dtype=torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in modules}
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for name, module in modules.items():
                times[name].append(_microseconds(partial(module, x)))
    medians = {name: statistics.median(of[1:]) for name, of in times.items()}
    records = [
        {"module": name, "d": D, "h": H, "call_us": median, "above_dense_us": median - medians["dense"]}
        for name, median in medians.items()
    ]
    print(*records, sep="\n")
    header = meta("python benchmarks/call_overhead.py", commit=commit())
    write(arguments.output, {"meta": header, "records": records})


def _sparse(dense: torch.nn.Module, name: str) -> SparseModule:
    site = GatedFFN("mlp", dense, Rows("gate_proj"), Rows("up_proj"), Rows("down_proj"), "silu")
    phases = Phases()
    phases.now = GENERATED  # as within a decoder's call with one new token
    module = SparseModule(
        site,
        method(name, sparsity=0.5),
        torch.full((H,), 0.1),
        phases=phases,
        apply_to="decode",
        artifacts={IMPORTANCE.name: torch.ones(D)},
    )
    module.lay_out()
    if module.refusal is not None:
        raise SystemExit(f"there is no kernel to measure: {module.refusal}")
    return module


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


if __name__ == "__main__":
    main()
