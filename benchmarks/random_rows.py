"""How fast a CPU reads rows that lie anywhere, against reading from end to end.

    python benchmarks/random_rows.py --output benchmarks/results/cpu-random-rows.json

Rows as long as those of d 576, 1536 and 4096 in bf16, of 1 GiB, by loops that only add: left to the processor, and with
the next rows fetched into the second cache. Needs g++.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from countdown.results import meta, write
from documents import commit

WIDTHS = (576, 1536, 4096)
SHARES = (1.0, 0.4, 0.2)
THREADS = (1, 2)


def main() -> None:
    """Compile, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if shutil.which("g++") is None:
        parser.error("g++ is not installed, which compiles the loop that is timed.")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "rows")
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run(["g++", "-O3", "-march=native", "-ffast-math", "-fopenmp", source, "-o", program], check=True)
        for threads in THREADS:
            for d in WIDTHS:
                for share in SHARES:
                    run = subprocess.run(
                        [program, str(2 * d), str(share), str(threads)], capture_output=True, text=True, check=True
                    )
                    plain, fetched = map(float, run.stdout.split())
                    case = {"row_bytes": 2 * d, "share": share, "threads": threads}
                    records.append(case | {"gb_per_s": plain, "fetched_gb_per_s": fetched})
                    print(records[-1], flush=True)
    header = meta("python benchmarks/random_rows.py", commit=commit())
    write(arguments.output, {"meta": header, "records": records})


if __name__ == "__main__":
    main()
