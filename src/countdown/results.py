"""Results files: what was measured, and what it takes to measure it again.

`{"meta": {"date", "command", "hardware", "versions", ...}, "records": [flat objects]}`
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from countdown.files import write_text


def meta(command: str | None = None, **more: Any) -> dict[str, Any]:
    """Return date, command, hardware and versions of this run, and whatever else is given."""
    return {
        **more,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command or shlex.join(["countdown", *_measuring(sys.argv[1:])]),
        "hardware": hardware(),
        "versions": versions(),
    }


def _measuring(arguments: list[str]) -> list[str]:
    """Return the arguments without those that say where results go and what to call them."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--json", "--commit"):
            next(rest, None)
        elif not argument.startswith(("--json=", "--commit=")):
            kept.append(argument)
    return kept


def hardware() -> dict[str, Any]:
    """Return the processor, its cores, torch's threads, and the GPU where there is one."""
    import torch

    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python, countdown, torch and transformers."""
    import torch
    import transformers

    from countdown import __version__

    return {
        "python": platform.python_version(),
        "countdown": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def write(target: str | Path, document: Any) -> None:
    """Write JSON to a file, see `files.write_text`, or to stdout for `-`, with null for what is not finite.

    Raises:
        AccidentError: The file cannot be written.
    """
    text = json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
        return
    write_text(Path(target), text)


def _finite(value: Any) -> Any:
    """Return a document with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_name() -> str:
    """Return what the processor is called, and its family and model: virtual machines often have half a name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        first = info.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        if "model name" in facts:
            kind = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
            return f"{facts['model name']} ({', '.join(kind)})" if kind else facts["model name"]
    return platform.processor() or platform.machine()
