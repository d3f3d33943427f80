"""Random cases of the CPU kernels, also with every access to memory checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from countdown.ops import cpu
from countdown.ops.cpu import library

if library.missing():
    pytest.skip(f"no CPU kernels: {library.missing()}", allow_module_level=True)

FUZZ = Path(__file__).with_name("fuzz_cpu.py")


def fuzz(file: Path, cases: int, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, FUZZ, file, str(cases)],
        check=False, capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, f"{cases} cases\n"), run.stderr[-3000:]


@pytest.mark.slow
def test_10000_cases():
    fuzz(
        next(Path(folder, name) for folder in cpu.__path__ for name in library.NAMES if Path(folder, name).exists()),
        10000,
    )


@pytest.mark.slow
def test_cases_with_every_access_checked(tmp_path):
    root = Path(__file__).parents[2]
    for command in (["-S", root, "-B", tmp_path, "-DCOUNTDOWN_SANITIZE=ON"], ["--build", tmp_path, "-j2"]):
        subprocess.run(["cmake", *command], check=True, capture_output=True)
    checker = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    checked = {"LD_PRELOAD": checker.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    fuzz(tmp_path / "countdown_cpu.so", 10000, **checked)
    # Teams that come out smaller than asked.
    fuzz(tmp_path / "countdown_cpu.so", 1000, **checked, OMP_THREAD_LIMIT="2")
