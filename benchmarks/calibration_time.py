"""How long `countdown calibrate` takes, without a method and with one.

python benchmarks/calibration_time.py MODEL --output benchmarks/results/calibration-time-NAME.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from countdown.results import meta, write
from documents import commit

CASES = {"auto": [], "d-proxy": ["--method", "d-proxy"], "m-countdown": ["--method", "m-countdown"]}


def main() -> None:
    """Run each once, in a process of its own, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    records = []
    for method, options in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            command = ["calibrate", arguments.model, "-o", f"{folder}/profile", "--sparsity", "0.5", *options, "-q"]
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "countdown", *command], check=True)
            seconds = time.perf_counter() - started
        records.append({"model": Path(arguments.model).name, "method": method, "seconds": seconds})
        print(records[-1])
    header = meta("python benchmarks/calibration_time.py MODEL", commit=commit())
    write(arguments.output, {"meta": header, "records": records})


if __name__ == "__main__":
    main()
