"""Runs every kernel on shapes that no block divides, for NVIDIA's compute-sanitizer:

export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:tests
compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

import torch

import kernel_cases as cases
from countdown.ops.triton import ops


def main() -> None:
    """Run them."""
    for d, h in ((1, 1), (37, 91), (300, 515)):
        for tokens in (1, 5):
            for dtype in (torch.bfloat16, torch.float32):
                cases.check_sparse(
                    tokens, d, h, dtype, "cuda", indicator="gate", activation="gelu", share=0.5, bias=True
                )
        weights, biases = cases.ffn(d, h, torch.float16, "cuda", bias=True)
        ops.project_one(cases.inputs(1, d, torch.float16, "cuda", 0), weights[0], biases[0])
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
