"""What measurements depend on besides settings: the weights, and what they run on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from countdown.loading import Source, explained
from countdown.ops.request import VARIABLE
from countdown.results import hardware, versions

# A file larger than this is known by its size and so many bytes at so many places, evenly spread.
WHOLE = 1 << 20
SAMPLES, SAMPLE = 64, 4096
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def model_hash(source: Source) -> str:
    """Return a hash of a model's files: of small ones whole, of weights by samples. On the hub, its commit.

    Raises:
        ConfigError: Nothing can be loaded under this name.
    """
    if not os.path.isdir(source.name):
        return _commit(source)
    folder = Path(source.name)
    names = [source.gguf_file] if source.gguf_file else sorted(path.name for path in folder.iterdir())
    found = hashlib.sha256()
    for path in (folder / name for name in names):
        if path.is_file() and (path.suffix in _WEIGHTS or path.suffix in (".json", ".model", ".txt", ".jinja", ".py")):
            found.update(f"{path.name} {path.stat().st_size} ".encode())
            found.update(_sampled(path))
    return found.hexdigest()


def environment(device: torch.device, dtype: str) -> dict[str, Any]:
    """Return what computes: versions, device, dtype, threads."""
    cuda = device.type == "cuda"
    facts = hardware()
    ao = importlib.util.find_spec("torchao") is not None
    return {
        "versions": versions() | ({"torchao": importlib.metadata.version("torchao")} if ao else {}),
        "device": torch.cuda.get_device_name(device) if cuda else facts["cpu"],
        "dtype": dtype,
        "threads": facts["threads"],
        "backend": os.environ.get(VARIABLE, "auto"),
    }


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= WHOLE:
        return hashlib.sha256(path.read_bytes()).digest()
    found = hashlib.sha256()
    with path.open("rb") as file:
        for place in range(SAMPLES):
            file.seek(place * (size - SAMPLE) // (SAMPLES - 1))
            found.update(file.read(SAMPLE))
    return found.digest()


def _commit(source: Source) -> str:
    from transformers import AutoConfig

    with explained(source):
        config = AutoConfig.from_pretrained(source.name, **source.arguments())
    return f"{source.name}@{getattr(config, '_commit_hash', None) or source.revision}"
