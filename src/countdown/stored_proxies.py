"""Proxies that are stored beside a profile, so that loading a model maps them into memory instead of making them.

Kernels for GPUs get a copy on the device, those for CPUs one in tiles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from countdown.models.sites import GatedFFN
from countdown.ops.proxy_format import group_of, padded

FILE = "proxy.safetensors"
PARTS = ("gate_levels", "gate_scales", "up_levels", "up_scales")
# Of packing and quantiser: another makes other proxies of the same weights.
FORMAT = 1
# Rows of each matrix that the hash of an FFN covers.
HASHED_ROWS = 64


@dataclass(frozen=True)
class StoredProxies:
    """Proxies by FFN, and what they were made from.

    Args:
        tensors: Levels and scales of gate and of up; see `ops.proxy`.
        hashes: See `source_hash`.
    """

    tensors: Mapping[str, list[Tensor]]
    hashes: Mapping[str, str]

    @classmethod
    def make(cls, sources: Mapping[str, tuple[GatedFFN, Tensor, int]]) -> StoredProxies:
        """Make the proxies of FFNs, by name, from their importance and bits."""
        tensors = {name: [t.cpu() for t in ffn.proxy(found, bits)] for name, (ffn, found, bits) in sources.items()}
        return cls(tensors, {name: source_hash(*source) for name, source in sources.items()})

    @classmethod
    def load(cls, path: Path) -> StoredProxies:
        """Map a file into memory. What can be wrong with it is as with any safetensors file."""
        with safe_open(path, "pt") as file:
            hashes: dict[str, str] = json.loads(file.metadata()["hashes"])
            return cls({name: [file.get_tensor(f"{name}/{part}") for part in PARTS] for name in hashes}, hashes)

    def save(self, path: Path) -> None:
        """Write the file."""
        flat = {
            f"{name}/{part}": t for name, found in self.tensors.items() for part, t in zip(PARTS, found, strict=True)
        }
        save_file(
            {name: tensor.contiguous() for name, tensor in flat.items()}, path, {"hashes": json.dumps(self.hashes)}
        )

    def of(self, ffn: GatedFFN, importance: Tensor, bits: int) -> list[Tensor] | None:
        """Return the proxy of an FFN, None where there is none, or one of something else."""
        found = self.tensors.get(ffn.name)
        if found is None or self.hashes[ffn.name] != source_hash(ffn, importance, bits):
            return None
        width = padded(ffn.d, bits)
        shapes = [(ffn.h, bits * width // 8), (ffn.h, width // group_of(ffn.d, bits))] * 2
        dtypes = [torch.uint8, torch.float16] * 2
        fits = [t.shape == shape and t.dtype == dtype for t, shape, dtype in zip(found, shapes, dtypes, strict=True)]
        return found if all(fits) else None


def source_hash(ffn: GatedFFN, importance: Tensor, bits: int) -> str:
    """Return a hash of what a proxy is made from: rows spread over gate and up, as float32, and importance."""
    found = hashlib.sha256(f"{FORMAT} {bits} {ffn.h} {ffn.d}".encode())
    for matrix in ffn.matrices[:2]:
        rows = torch.linspace(0, ffn.h - 1, HASHED_ROWS, device=matrix.device).long()
        found.update(matrix.detach()[rows].float().cpu().numpy().tobytes())
    found.update(importance.float().cpu().numpy().tobytes())
    return found.hexdigest()
