"""Compiles every kernel for a device that need not be here, and prints the shared memory of each as JSON.

python tests/compile_kernels.py cuda:89 101376
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from countdown.ops.triton import dense_kernels, kernels, launch, pair_kernels, proxy_kernels

POINTERS = {
    "per_neuron": "*fp32", "partial": "*fp32", "listed_count": "*i32", "listed": "*i32",
    "active_set": "*i8", "needs": "*i8", "counters": "*i64", "mask": "*i1",
    "largest": "*fp32", "total": "*fp32", "scale": "fp32", "words": "*i32", "sums": "*fp32", "steps": "*fp32",
    "gate_levels": "*i32", "up_levels": "*i32", "gate_scales": "*fp16", "up_scales": "*fp16",
}  # fmt: skip
WEIGHTS = {
    "x", "first", "other", "down", "gate", "up", "s", "y", "q", "keys", "values",
    "known", "down_bias", "first_bias", "other_bias", "gate_bias", "up_bias", "w0", "w1", "w2", "b0", "b1", "b2",
}  # fmt: skip


def main() -> None:
    """Print `{kernel, dtype and shape: bytes}`."""
    backend, _, arch = sys.argv[1].partition(":")
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)
    found = launch.Hardware(
        multiprocessors=100,
        shared=int(sys.argv[2]),
        dependent_launch=False,
        dot4=backend == "cuda",
        tf32=backend == "cuda",
    )
    shared = {}
    for d, h in ((576, 1536), (4096, 14336)):
        for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
            columns, _ = launch.columns(d, h, itemsize, found)
            form = {"ACT": "silu", "BIAS": True, "d": d}
            given = dtype == "bf16"  # deciding, two tokens of 16 bits go through tiles
            for kernel, config, more in (
                (kernels.decide_and_sum, launch.decide(d, h, itemsize, h // 5, found), form | {"GATE_FIRST": False}),
                (kernels.sum_listed, launch.listed(d, h, itemsize, found), form),
                (kernels.coefficients, launch.tiled(d, h, itemsize, found), {"MODE": "decide", "GATE_FIRST": True}
                 | {"ACT": "silu", "BIAS": True}),
                (kernels.sum_columns, columns, {}),
                (dense_kernels.project_one, launch.projection(h, [d, d], itemsize, found), {"BIAS": True, "d": h}),
                (dense_kernels.attend_block, launch.attention(700, 4, d // 32), {"QUERIES": 4, "MASK": True}),
                (dense_kernels.attend_all, launch.combination(11, launch.attention(700, 4, d // 32)), {"QUERIES": 4}),
                (proxy_kernels.quantise_tokens, launch.quantisation(d, 8, found), {}),
                (proxy_kernels.select_by_proxy, launch.proxy_selection(d, h, 8, found), {"ACT": "silu", "BIAS": True}
                 | {"COUNT": True}),
                (proxy_kernels.decide_by_proxy_and_sum, launch.proxy_decision(d, h, itemsize, h // 5, found), form),
                (pair_kernels.decide_and_sum_pair, launch.pair(d, h, itemsize, h // 3, found, given=given), form
                 | {"GATE_FIRST": False, "GIVEN": given}),
                (pair_kernels.decide_by_proxy_and_sum_pair, launch.pair_by_proxy(d, h, itemsize, h // 3, found), form),
                (kernels.reduce, launch.reduction(d, 200, 8), {"BIAS": True}),
            ):  # fmt: skip
                size = compiled(kernel, {**config.constants, "PDL": False, **more}, dtype, config.warps, target)
                shared[f"{kernel.__name__} {dtype} {d}"] = size
    print(json.dumps(shared))


def compiled(kernel: triton.JITFunction, constants: dict, dtype: str, warps: int, target: GPUTarget) -> int:
    """Return the bytes of shared memory of one kernel, its pointers and sizes multiples of 16."""
    names = kernel.arg_names
    pointers = {name: POINTERS.get(name, f"*{dtype}") for name in names if name in POINTERS or name in WEIGHTS}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    sizes = [n for n in names if (n in ("d", "h") or n.endswith("stride")) and n not in constants]
    aligned = [*pointers.keys() - {"scale"}, *sizes]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options={"num_warps": warps}).metadata.shared


if __name__ == "__main__":
    main()
