"""Compiles every kernel for a device that need not be here, and prints the shared memory of each as JSON.

python tests/compile_kernels.py cuda:89 101376
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from countdown.ops.triton import deciders, dense_kernels, drawing_kernels, kernels, launch, linear_kernels, loaders

ITEMSIZE = {"bf16": 2, "fp32": 4}
# From here on kernels may start before the one before them has ended.
HOPPER = 90
# An argument is described by its type, a tuple by those of its parts; what is no type is a constant. A size is an int
# that 16 divides, and so is every pointer.
SIZE, INT = "size", "i32"
Kernels = Iterator[tuple[str, triton.JITFunction, launch.Launch, dict[str, Any]]]


def main() -> None:
    """Print `{kernel, dtypes and shape: bytes}`."""
    backend, _, arch = sys.argv[1].partition(":")
    hopper = backend == "cuda" and int(arch) >= HOPPER
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)
    found = launch.Hardware(
        multiprocessors=100,
        shared=int(sys.argv[2]),
        dependent_launch=hopper,
        dot4=backend == "cuda",
        tf32=backend == "cuda",
    )
    shared = {}
    for d, h in ((576, 1536), (4096, 14336)):
        for x, w in (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16")):
            described = [*_of_rows(d, h, x, w, found), *_of_tiles(d, h, x, w, found), *_of_linears(d, h, x, w, found)]
            if x == w:
                described += _dense(d, h, x, found)
            for name, kernel, config, arguments in described:
                shared[f"{name} {x} {w} {d}"] = _compiled(kernel, config, arguments | {"PDL": hopper}, target)
    print(json.dumps(shared))


def _weights(x: str, w: str) -> dict[str, Any]:
    weight = (loaders.plain, f"*{w}", SIZE)
    weights = dict.fromkeys(("first", "other", "down"), weight)
    return weights | {"x": f"*{x}", "biases": (f"*{w}",) * 2, "ACT": "silu", "h": SIZE}


def _of_rows(d: int, h: int, x: str, w: str, found: launch.Hardware) -> Kernels:
    """Yield the kernels of one token and two, and of proxies."""
    how = launch.packed(d, found)
    weights = _weights(x, w)
    proxy = ("*i32", "*fp16")
    by_proxy = {"by": (proxy, proxy, weights["biases"], "*fp32"), "DECIDE": deciders.by_proxy, "HOW": how}
    by = {
        "projection": {"by": (f"*{w}", "*fp32"), "DECIDE": deciders.by_projection,
                       "READ": deciders.as_they_are, "HOW": (False,)},
        "proxy": {**by_proxy, "READ": deciders.rounded_here},
        "sets": {"by": ("*i8", SIZE), "DECIDE": deciders.given, "READ": deciders.as_they_are, "HOW": ()},
    }  # fmt: skip
    by["second look"] = by["projection"] | {"second": "*fp32"}
    read = {"proxy": 8 * how[1], "sets": 2}
    some = {"partial": "*fp32", "counters": "*i64", "phases": "*u8", "x_stride": SIZE}
    for name, arguments in by.items():
        for tokens in (1, 2):
            looks = 1 + ("second" in arguments)
            config = launch.row_blocks(d, h, ITEMSIZE[w], tokens, h // 3, found, read=read.get(name), looks=looks)
            assert config is not None
            more = {"d": d, "KNOWN": name not in read, "GATE_FIRST": False}
            yield (
                f"{name} {tokens}",
                kernels.decide_and_sum,
                config,
                weights | some | {"second": None} | arguments | more,
            )
    rounded = {"x": ("*i32", "*fp32", "*fp32"), "READ": deciders.rounded_before}
    config = launch.row_selection(h, 8, read["proxy"], found)
    yield "select", kernels.select_rows, config, some | by_proxy | rounded | {
        "active_set": "*i8", "h": SIZE, "d": SIZE, "ACT": "silu",
    }  # fmt: skip
    yield "quantise", deciders.quantise_tokens, launch.quantisation(d, 8, found), {
        "x": f"*{x}", "x_stride": SIZE, "words": "*i32", "sums": "*fp32", "steps": "*fp32", "d": SIZE,
    }  # fmt: skip
    listed = weights | {"listed": "*i32", "listed_count": "*i32", "partial": "*fp32", "d": d}
    yield "listed", kernels.sum_listed, launch.listed(d, h, ITEMSIZE[w], found), listed


def _of_linears(d: int, h: int, x: str, w: str, found: launch.Hardware) -> Kernels:
    """Yield the kernels of sparse linears that read one input."""
    cases = (("together", 1, [d, h, h], []), ("tokens", 8, [h], []), ("low rank", 1, [d, h, h], [60, 20, 20]))
    for name, tokens, heights, ranks in cases:
        form = launch.channels(d, heights, ranks, ITEMSIZE[w], tokens, found)
        sizes = {
            "sizes": (SIZE,) * 3,
            "ranks": (SIZE,) * 3,
            "partial": "*fp32",
            "d": SIZE,
            "x": f"*{x}",
            "x_stride": SIZE,
        }
        sizes |= {"thresholds": ("*fp32",) * 3, "phases": "*u8", "counters": ("*i64",) * 3}
        matrices = (*(f"*{w}",) * 3, *(SIZE,) * 3)
        low = {"low": "*fp32" if ranks else None}
        yield f"linear {name}", linear_kernels.sum_channels, form.launch, sizes | low | {
            "weights": matrices, "inner": matrices if ranks else None, "active_set": None,
            "tiles": INT, "low_tiles": INT, "low_programs": INT, "LOAD": loaders.plain,
        }  # fmt: skip
        last = launch.finish(d, heights, ranks, form, tokens, counting=True)
        yield f"finish {name}", linear_kernels.finish, last, sizes | low | {
            "outer": matrices if ranks else None, "biases": (f"*{w}",) * 3, "y": f"*{x}",
            "splits": INT, "low_splits": INT, "tokens": INT, "HAS_BIAS": True,
        }  # fmt: skip
    yield "channels", linear_kernels.select_channels, launch.channel_selection(d, 8), {
        "x": f"*{x}", "x_stride": SIZE, "thresholds": "*fp32", "phases": "*u8", "active_set": "*i8", "d": SIZE,
    }  # fmt: skip


def _of_tiles(d: int, h: int, x: str, w: str, found: launch.Hardware) -> Kernels:
    """Yield the kernels of several tokens."""
    weights, mixed = _weights(x, w), x != w
    tiled = weights | {
        "x_stride": SIZE, "per_neuron": "*fp32", "phases": "*u8",
        "active_set": None, "s": f"*{x}", "needs": "*i8", "counters": "*i64", "tokens": INT, "d": SIZE,
        "GATE_FIRST": True,
    }  # fmt: skip
    for second in (None, "*fp32"):
        config = launch.tiled(d, h, ITEMSIZE[w], found, mixed=mixed)
        yield f"coefficients {second}", kernels.coefficients, config, tiled | {"second": second}
    columns, _ = launch.columns(d, h, ITEMSIZE[w], found, mixed=mixed)
    yield "columns", kernels.sum_columns, columns, {
        "s": f"*{x}", "needs": "*i8", "down": weights["down"], "partial": "*fp32", "tokens": INT, "d": SIZE,
        "h": SIZE, "per_program": INT,
    }  # fmt: skip
    predicted = ("*i32", "*fp16", "*fp32", "*fp32", f"*{x}", SIZE)
    for added, how in ((None, None), (predicted, launch.packed(d, found))):
        yield f"reduce {how}", kernels.reduce, launch.reduction(d, 200, 8, how, early=True), {
            "partial": "*fp32", "down_bias": f"*{w}", "y": f"*{x}", "programs": INT, "tokens": INT, "d": SIZE,
            "predicted": added, "phases": "*u8",
        }  # fmt: skip


def _dense(d: int, h: int, x: str, found: launch.Hardware) -> Kernels:
    """Yield the kernels of the rest of a step."""
    pointers = dict.fromkeys(
        ("x", "w0", "w1", "w2", "b0", "b1", "b2", "y", "q", "keys", "values", "gate", "up", "gate_bias", "up_bias",
         "weight", "sums", "out", "logits"), f"*{x}",
    )  # fmt: skip
    config = launch.projection(h, [d, d], ITEMSIZE[x], found)
    heights = dict.fromkeys(("h0", "h1", "h2", "h"), INT)
    yield "project", dense_kernels.project_one, config, pointers | heights | {"BIAS": True, "d": h}
    gated = launch.projection(d, [h], ITEMSIZE[x], found, together=2)
    yield "gated", dense_kernels.gated_one, gated, pointers | heights | {"ACT": "silu", "d": d}
    for y in (f"*{x}", None):
        yield f"norm {y}", dense_kernels.normalise, launch.normalisation(1, d), pointers | {
            "y": y, "x_stride": SIZE, "y_stride": SIZE, "d": SIZE, "eps": "fp32", "ROUNDED": True, "OVERLAP": True,
        }  # fmt: skip
    attention = launch.attention(700, 4, d // 32)
    blocks = {"largest": "*fp32", "total": "*fp32", "partial": "*fp32"}
    strides = ("query_stride", "key_stride", "key_step", "value_stride", "value_step")
    new = (f"*{x}", f"*{x}", SIZE, SIZE, "*i64", "*i64")
    for name, more in (("attend", {"new": None, "rotation": None}), ("attend next", {"new": new, "rotation": new[:2]})):
        yield name, dense_kernels.attend_block, attention, pointers | blocks | dict.fromkeys(strides, SIZE) | {
            "mask": "*i1", "scale": "fp32", "length": INT, "half": d // 64, "QUERIES": 4, **more,
        }  # fmt: skip
    yield "combine", dense_kernels.attend_all, launch.combination(11, attention), pointers | blocks | {
        "blocks": INT, "size": d // 32, "QUERIES": 4, "OVERLAP": False,
    }  # fmt: skip
    places = {"ranks": "*i32", "places": "*i32", "n": INT, "blocks": INT, "y": "*i64"}
    yield "angles", dense_kernels.angles_one, launch.angles(d // 64), {
        "position": "*i64", "frequencies": "*fp32", "cos": f"*{x}", "sin": f"*{x}", "n": INT, "scale": "fp32",
    }  # fmt: skip
    yield "largest of block", dense_kernels.largest_of_block, launch.largest(49152), pointers | places
    yield "largest of all", dense_kernels.largest_of_all, launch.largest_of_all(48), places
    searched = launch.drawing(128_256)
    some = pointers | places | {
        "sums_before": "*fp32", "sums": "*fp32", "state": "*i32", "shift": INT, "wanted": "fp32", "temperature": "fp32",
    }  # fmt: skip
    for first, by_mass in ((True, False), (False, True)):
        before = {"sums_before": None} if first else {}
        yield f"narrow {by_mass}", drawing_kernels.narrow, searched, some | before | {
            "STARTS": first, "BY_MASS": by_mass,
        }  # fmt: skip
    yield "draw", drawing_kernels.draw_of_block, launch.drawn(searched), some | {
        "seed": "i64", "floor": "fp32", "largest": "*fp32", "ranks_drawn": "*i32",
    }  # fmt: skip


def _compiled(kernel: triton.JITFunction, config: launch.Launch, arguments: dict[str, Any], target: GPUTarget) -> int:
    """Return the bytes of shared memory of a kernel."""
    signature, constants, aligned = {}, {}, {}

    def described(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple) and not kernel.params[path[0]].is_constexpr:
            return tuple(described(part, (*path, place)) for place, part in enumerate(value))
        if not isinstance(value, str) or kernel.params[path[0]].is_constexpr:
            constants[path] = value
            return "constexpr"
        if value == SIZE or value.startswith("*"):
            aligned[path] = [["tt.divisibility", 16]]
        return INT if value == SIZE else value

    given = {**arguments, **config.constants}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = described(given[name], (place,))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": config.warps}).metadata.shared


if __name__ == "__main__":
    main()
