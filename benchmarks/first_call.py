"""How long the first sparse FFN of a new process takes, with nothing compiled before.

python benchmarks/first_call.py --output benchmarks/results/first-call-NAME.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from countdown.results import meta, write
from documents import commit

CODE = """
import time, torch
from countdown.ops import backends
d, h = 4096, 14336
gate, up, down = (torch.randn(h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
x, counters = torch.randn(1, d, device="cuda", dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64, device="cuda")
thresholds = torch.full((h,), 60.0, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
torch.ops.countdown.sparse(
    x, [gate, up, down.t()], [None] * 3, thresholds, counters, None, kind="ffn", formats=["plain"] * 3,
    activation="silu", selector="up", rule="threshold", drop=h * 4 // 5,
)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def main() -> None:
    """Measure three times and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", help="where the checkout has no git history")
    arguments = parser.parse_args()
    records = []
    for cached in (False, True, True):
        with tempfile.TemporaryDirectory() as fresh:
            environment = os.environ if cached else os.environ | {"TRITON_CACHE_DIR": fresh}
            run = subprocess.run(
                [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True
            )
        records.append({"d": 4096, "h": 14336, "cached": cached, "first_call_s": float(run.stdout)})
        print(records[-1], flush=True)
    header = meta("python benchmarks/first_call.py", commit=arguments.commit or commit())
    write(arguments.output, {"meta": header, "records": records})


if __name__ == "__main__":
    main()
