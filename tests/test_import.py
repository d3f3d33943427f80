"""What an import costs, and that every public name is there."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

import countdown
from countdown.ops.cpu import library


def loaded_by(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import countdown",
        "import countdown; countdown.method('m-countdown', sparsity=0.7)",
        "import countdown; countdown.ConfigError",
        "import countdown.cli",
    ],
)
def test_light(code):
    assert not {"torch", "transformers", "matplotlib", "numpy"} & loaded_by(code)


def test_a_name_that_no_method_has_is_refused_before_torch_loads():
    code = """
import sys
from countdown.cli import main
for command in (["calibrate", "m"], ["evaluate", "m"], ["generate", "m", "hi"], ["compare", "m"], ["benchmark", "ffn"],
                ["benchmark", "decode"]):
    sys.argv = ["countdown", *command, "--method", "nope"]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 2
"""
    assert not {"torch", "transformers"} & loaded_by(code)


def test_every_public_name_exists():
    assert all(hasattr(countdown, name) for name in countdown.__all__)
    assert set(countdown.__all__) == {*countdown._HOMES, "__version__"}


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'sparsfy_'"):
        countdown.sparsfy_  # noqa: B018


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert version("countdown-llm") == countdown.__version__


@pytest.mark.parametrize(
    "code",
    [
        "import sys, countdown; countdown.from_pretrained(sys.argv[1], device='cpu')",
        "import torch; from countdown.benchmark.decode import random_model\n"
        "random_model('llama-3.1-8b', torch.device('meta'), layers=1)",
    ],
)
def test_what_torchao_lacks_is_not_said_where_we_import_it(code, model_folder):
    run = subprocess.run([sys.executable, "-c", code, str(model_folder)], capture_output=True, text=True, check=True)
    assert "torchao" not in run.stderr
    assert "register_constant" not in run.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_cpu_kernels_are_built_where_there_is_a_compiler():
    # The package installs without them, and their own tests are left out then: an error in them would pass unseen.
    assert library.missing() is None
