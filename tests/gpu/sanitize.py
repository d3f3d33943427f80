"""Runs every kernel on shapes that no block divides, for NVIDIA's compute-sanitizer:

export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:tests
seq 0 15 | xargs -P 16 -I{} compute-sanitizer --tool memcheck python tests/gpu/sanitize.py {} 16

Under a tool a kernel is slow to load, so the cases are dealt out: the numbers say which of how many parts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

import kernel_cases as cases
from countdown.ops.triton import dense_ops, drawing_ops

SHAPES = (1, 1), (37, 91), (300, 515)
PHASES = [0, 2, 1, 0, 0]


def main(part: int = 0, parts: int = 1) -> None:
    """Run them, or a part of them."""
    for case in every_case()[part::parts]:
        case()
    torch.cuda.synchronize()
    print("all kernels ran" if parts == 1 else f"part {part} of {parts} ran")


def every_case() -> list[Callable[[], Any]]:
    """Return what there is to run."""
    found: list[Callable[[], Any]] = []
    for (d, h), tokens, dtype in product(SHAPES, (1, 2, 5), (torch.bfloat16, torch.float32)):
        where = tokens, d, h, dtype, "cuda"
        phases, more = PHASES[:tokens], {"activation": "gelu", "bias": True}
        look = {"shares": (0.4, 0.6), "phases": torch.tensor(phases, dtype=torch.uint8)}
        found += [
            partial(cases.check_sparse, *where, indicator="gate", share=0.5, **more),
            partial(cases.check_proxy, *where, share=0.5, **more),
            partial(cases.check_linear, *where, share=0.5, bias=True, phases=phases),
            partial(cases.check_affine, *where, by="up", phases=phases, bias=True),
            partial(cases.check_second_look, *where, indicator="up", **more, **look),
            partial(cases.check_phases, phases, d, h, dtype, "cuda", by="proxy-4"),
        ]
    widths = [515, 37, 1], torch.bfloat16, "cuda", torch.ops.countdown.sparse_together
    found += [partial(_project, d, h) for d, h in SHAPES]
    found += [partial(_draw, dtype) for dtype in (torch.bfloat16, torch.float32)]
    return [
        *found,
        partial(cases.check_linear, 2, 300, 515, torch.bfloat16, "cuda", share=0.5, bias=True, phases=[0, 2], rank=21),
        partial(cases.check_together, 1, 300, *widths, [21, 1, 1]),
        partial(cases.check_together, 1, 300, *widths),
        _attend,
    ]


def _project(d: int, h: int) -> None:
    """Multiply as a dense layer does."""
    weights, biases = cases.ffn(d, h, torch.float16, "cuda", bias=True)
    dense_ops.project(cases.inputs(1, d, torch.float16, "cuda", 0), weights[:2], biases[:2])


def _attend() -> None:
    """Let one token attend."""
    keys = cases.inputs(2 * 70, 40, torch.bfloat16, "cuda", 1).view(1, 2, 70, 40)
    dense_ops.attend_one(cases.inputs(6, 40, torch.bfloat16, "cuda", 0).view(1, 6, 1, 40), keys, keys, None, 0.5)


def _draw(dtype: torch.dtype) -> None:
    """Draw a token."""
    drawing_ops.draw_one(cases.inputs(1, 2500, dtype, "cuda", 0), 0.8, 40, 0.9, 0.01, 3)


if __name__ == "__main__":
    main(*(int(one) for one in sys.argv[1:]))
