"""What is derived from weights and artifacts and stored beside a profile, so that loading a model maps it into memory
instead of making it: the parts of selectors.

Kernels for GPUs get a copy on the device, those for CPUs one in tiles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from countdown.artifacts import Artifacts
from countdown.autocast import without_autocast
from countdown.selectors import Selector
from countdown.sites import Site
from countdown.weights import FORMATS, Weight

FILE = "proxy.safetensors"
# Of packing and quantiser: another makes other parts of the same weights.
FORMAT = 1
# Rows of each matrix that the hash of a site covers.
HASHED_ROWS = 64
# What parts are made from: the site, the selector, and the site's artifacts.
Source = tuple[Site, Selector, Artifacts]


@dataclass(frozen=True)
class StoredParts:
    """Parts of selectors, and what they were made from.

    Args:
        tensors: By `SITE/PART_TENSOR`, such as `model.layers.0.mlp/gate_levels`.
        hashes: By site; see `source_hash`.
    """

    tensors: Mapping[str, Tensor]
    hashes: Mapping[str, str]

    @classmethod
    @without_autocast()
    @torch.no_grad()
    def make(cls, sources: Mapping[str, Source]) -> StoredParts:
        """Make the parts of sites, by name."""
        tensors: dict[str, Tensor] = {}
        for name, (site, selector, artifacts) in sources.items():
            keys = _keys(name, site, selector)
            made = [tensor.cpu() for part in selector.make(site.sum, artifacts) for tensor in part.parts]
            tensors |= dict(zip((key for some in keys for key in some), made, strict=True))
        return cls(tensors, {name: source_hash(*source) for name, source in sources.items()})

    @classmethod
    def load(cls, path: Path) -> StoredParts:
        """Map a file into memory. What can be wrong with it is as with any safetensors file."""
        with safe_open(path, "pt") as file:
            hashes = json.loads(file.metadata()["hashes"])
            if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
                raise ValueError(f"hashes in {path.name} are not text by site")
            return cls({key: file.get_tensor(key) for key in file.keys()}, hashes)  # noqa: SIM118

    def save(self, path: Path) -> None:
        """Write the file."""
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        save_file(tensors, path, {"hashes": json.dumps(self.hashes)})

    def of(self, source: Source) -> Sequence[Weight] | None:
        """Return the parts of a site, None where there are none, or those of something else."""
        site, selector, _ = source
        keys = _keys(site.name, site, selector)
        stored = all(key in self.tensors for some in keys for key in some)
        if not stored or self.hashes.get(site.name) != source_hash(*source):
            return None
        sum_ = site.sum
        formats, shapes = selector.part_formats(sum_), selector.shapes(sum_.weights[0].shape[1], sum_.terms)
        parts = [
            FORMATS.get(name).of([self.tensors[key] for key in some], shape)
            for name, some, shape in zip(formats.values(), keys, shapes, strict=True)
        ]
        return parts if all(part.problem() is None for part in parts) else None


def _keys(name: str, site: Site, selector: Selector) -> list[list[str]]:
    """Return the keys of each part's tensors."""
    formats = selector.part_formats(site.sum)
    return [[f"{name}/{part}_{of}" for of in FORMATS.get(format_).part_names] for part, format_ in formats.items()]


def source_hash(site: Site, selector: Selector, artifacts: Artifacts) -> str:
    """Return a hash of what parts are made from: rows of all matrices but the last, as float32, and artifacts."""
    weights = site.sum.weights[:-1]
    h, d = weights[0].shape
    found = hashlib.sha256(f"{FORMAT} {selector.made_as} {h} {d}".encode())
    for weight in weights:
        rows = torch.linspace(0, h - 1, HASHED_ROWS, device=weight.device, dtype=torch.float32).long()
        found.update(weight.some_rows(rows).float().cpu().numpy().tobytes())
    for one in selector.artifacts:
        found.update(artifacts[one.name].float().cpu().numpy().tobytes())
    return found.hexdigest()
