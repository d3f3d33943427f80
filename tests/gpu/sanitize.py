"""Runs every kernel on shapes that no block divides, for NVIDIA's compute-sanitizer:

export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:tests
python tests/gpu/sanitize.py  # compiles them, which takes much longer under a tool
compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

import torch

import kernel_cases as cases
from countdown.ops.triton import dense_ops, drawing_ops


def main() -> None:
    """Run them."""
    for d, h in ((1, 1), (37, 91), (300, 515)):
        for tokens in (1, 2, 5):
            for dtype in (torch.bfloat16, torch.float32):
                cases.check_sparse(
                    tokens, d, h, dtype, "cuda", indicator="gate", activation="gelu", share=0.5, bias=True
                )
                cases.check_proxy(tokens, d, h, dtype, "cuda", activation="gelu", share=0.5, bias=True)
                cases.check_linear(tokens, d, h, dtype, "cuda", share=0.5, bias=True, phases=[0, 2, 1, 0, 0][:tokens])
                cases.check_affine(tokens, d, h, dtype, "cuda", by="up", phases=[0, 2, 1, 0, 0][:tokens], bias=True)
                look = {"shares": (0.4, 0.6), "phases": torch.tensor([0, 2, 1, 0, 0][:tokens], dtype=torch.uint8)}
                cases.check_second_look(
                    tokens, d, h, dtype, "cuda", indicator="up", activation="gelu", bias=True, **look
                )
                cases.check_phases([0, 2, 1, 0, 0][:tokens], d, h, dtype, "cuda", by="proxy-4")
        weights, biases = cases.ffn(d, h, torch.float16, "cuda", bias=True)
        dense_ops.project(cases.inputs(1, d, torch.float16, "cuda", 0), weights[:2], biases[:2])
    cases.check_linear(2, 300, 515, torch.bfloat16, "cuda", share=0.5, bias=True, phases=[0, 2], rank=21)
    cases.check_together(1, 300, [515, 37, 1], torch.bfloat16, "cuda", torch.ops.countdown.sparse_together, [21, 1, 1])
    cases.check_together(1, 300, [515, 37, 1], torch.bfloat16, "cuda", torch.ops.countdown.sparse_together)
    keys = cases.inputs(2 * 70, 40, torch.bfloat16, "cuda", 1).view(1, 2, 70, 40)
    dense_ops.attend_one(cases.inputs(6, 40, torch.bfloat16, "cuda", 0).view(1, 6, 1, 40), keys, keys, None, 0.5)
    for dtype in (torch.bfloat16, torch.float32):
        drawing_ops.draw_one(cases.inputs(1, 2500, dtype, "cuda", 0), 0.8, 40, 0.9, 0.01, 3)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
