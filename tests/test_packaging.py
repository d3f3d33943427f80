"""The wheel: with a C++ compiler it brings the CPU kernels, without one it installs and runs on the reference."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import torch
from countdown.ops import backends, reference
weights = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 4).t()]
arguments = (torch.randn(1, 4), weights, [None] * 3, torch.ones(1, 6, dtype=torch.bool))
y = torch.ops.countdown.given_ffn(*arguments, activation="silu")
torch.testing.assert_close(y, reference.given_ffn(*arguments, activation="silu"))
print(backends.__file__)
print(backends.refuses_ffn(weights, decision="threshold", indicator="up", activation="silu"))
"""


def built(folder: Path, **environment: str) -> Path:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder,
         "--config-settings", f"build-dir={folder / 'build'}", ROOT],
        check=False, capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


def libraries(wheel: Path) -> list[str]:
    return [name for name in ZipFile(wheel).namelist() if name.endswith(".so")]


def probed(wheel: Path, folder: Path) -> list[str]:
    """Return where the installed package lies and what it says of its CPU kernels."""
    ZipFile(wheel).extractall(folder)
    # Without site, so that this repository's own installation is not found before the wheel's.
    paths = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    run = subprocess.run(
        [sys.executable, "-S", "-c", PROBE], check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths}, cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


@pytest.mark.slow
def test_with_a_compiler_the_wheel_has_kernels_for_any_python(tmp_path):
    wheel = built(tmp_path)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert libraries(wheel) == ["countdown/ops/cpu/countdown_cpu.so"]
    file, refusal = probed(wheel, tmp_path / "installed")
    assert file.startswith(str(tmp_path))
    assert refusal == "None"


@pytest.mark.slow
def test_without_a_compiler_the_wheel_runs_on_the_reference(tmp_path):
    wheel = built(tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not libraries(wheel)
    file, refusal = probed(wheel, tmp_path / "installed")
    assert file.startswith(str(tmp_path))
    assert refusal == "its library was not built: that takes a C++ compiler when the package is installed"


@pytest.mark.slow
def test_the_source_distribution_has_the_kernels(tmp_path):
    code = f"import scikit_build_core.build as backend; print(backend.build_sdist({str(tmp_path)!r}))"
    environment = tmp_path / "environment"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", environment, "scikit-build-core>=1.0"]
    subprocess.run(pip, check=True, capture_output=True)
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(environment)},
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    names = subprocess.run(["tar", "-tf", archive], check=True, capture_output=True, text=True).stdout
    for name in ("CMakeLists.txt", "csrc/countdown.h", "csrc/variant_avx2.cpp", "src/countdown/ops/cpu/library.py"):
        assert f"/{name}\n" in names
    assert ".so\n" not in names
