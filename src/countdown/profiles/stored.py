"""What is derived from weights and artifacts and stored beside a profile, so that loading a model maps it into memory
instead of making it: the parts of selectors and compensations.

Kernels get a copy of most, on the device or in another layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_IMODE
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from countdown.artifacts import Artifacts
from countdown.autocast import without_autocast
from countdown.methods import Method
from countdown.parts import Keeper
from countdown.progress import track
from countdown.sites import Site
from countdown.weights import FORMATS, Weight

FILE = "derived.safetensors"
# Of how parts are made and packed: another makes other parts of the same weights.
FORMAT = 1
# Rows of each matrix that the hash of a source covers.
HASHED_ROWS = 64
# Weights from which on deriving others of them shows progress.
SLOW_WEIGHTS = 300_000_000
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """What the parts of one site, that one keeper has, are derived from.

    Args:
        role: What the keeper is of the site's method; see `Method.keepers`.
        site: The site.
        keeper: What keeps them.
        artifacts: The site's.
    """

    role: str
    site: Site
    keeper: Keeper
    artifacts: Artifacts

    @property
    def name(self) -> str:
        """Under which the parts are stored: `model.layers.0.mlp/selector`, say."""
        return f"{self.site.name}/{self.role}"

    @property
    def part_bytes(self) -> int:
        """Bytes of the parts."""
        return self.keeper.part_bytes(self.site.sum)

    def make(self) -> tuple[Weight, ...]:
        """Return the parts."""
        return self.keeper.make(self.site.sum, self.artifacts)

    def hash(self) -> str:
        """Return a hash of shapes of the weights, of some of their rows, as float32, of artifacts and `made_as`."""
        sum_ = self.site.sum
        found = hashlib.sha256(f"{FORMAT} {self.keeper.made_as(sum_)}".encode())
        for weight in self.keeper.made_from(sum_):
            last = weight.shape[0] - 1
            rows = torch.linspace(0, last, HASHED_ROWS, device=weight.device, dtype=torch.float32).long()
            found.update(str(tuple(weight.shape)).encode())
            found.update(weight.some_rows(rows).float().cpu().numpy().tobytes())
        for one in self.keeper.artifacts:
            if one.name in self.artifacts:  # a profile that lacks one is refused where parts are made
                found.update(self.artifacts[one.name].float().cpu().numpy().tobytes())
        return found.hexdigest()


def sources_of(site: Site, method: Method, artifacts: Artifacts) -> list[Source]:
    """Return what the parts of a site are derived from, under the method that it has."""
    return [Source(role, site, keeper, artifacts) for role, keeper in method.keepers.items() if keeper.derived]


@dataclass(frozen=True)
class Made:
    """What is said of parts beside their tensors.

    Args:
        hash: That of their source.
        formats: Of each part.
    """

    hash: str
    formats: Sequence[str]


@dataclass(frozen=True)
class StoredParts:
    """Parts, and what they were made from.

    Args:
        tensors: By name of the source, place among its parts, and tensor of the part, such as
            `model.layers.0.mlp/selector/0/levels`.
        made: By name of the source.
    """

    tensors: Mapping[str, Tensor]
    made: Mapping[str, Made]

    @classmethod
    @without_autocast()
    @torch.no_grad()
    def make(cls, sources: Sequence[Source]) -> StoredParts:
        """Make the parts."""
        tensors: dict[str, Tensor] = {}
        made: dict[str, Made] = {}
        for source in deriving(sources, sum(source.site.size for source in sources)):
            parts = source.make()
            made[source.name] = Made(source.hash(), [part.format for part in parts])
            for keys, part in zip(_keys(source.name, made[source.name]), parts, strict=True):
                tensors |= {key: tensor.cpu() for key, tensor in zip(keys, part.parts, strict=True)}
        return cls(tensors, made)

    @classmethod
    def load(cls, path: Path) -> StoredParts:
        """Map a file into memory. What can be wrong with it is as with any safetensors file."""
        with safe_open(path, "pt") as file:
            made = {name: Made(**one) for name, one in json.loads(file.metadata()["made"]).items()}
            return cls({key: file.get_tensor(key) for key in file.keys()}, made)  # noqa: SIM118

    def save(self, path: Path) -> None:
        """Write the file."""
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        # safetensors makes a file that its owner alone may read.
        path.touch()
        mode = S_IMODE(path.stat().st_mode)
        save_file(tensors, path, {"made": json.dumps({name: asdict(one) for name, one in self.made.items()})})
        path.chmod(mode)

    def of(self, source: Source) -> Sequence[Weight] | None:
        """Return the parts of a source, None where there are none, or those of something else."""
        made = self.made.get(source.name)
        if made is None or made.hash != source.hash():
            return None
        sum_, keys = source.site.sum, _keys(source.name, made)
        shapes = source.keeper.shapes(sum_.weights[0].shape[1], sum_.terms)
        if len(shapes) != len(keys) or not all(key in self.tensors for some in keys for key in some):
            return None
        parts = [
            FORMATS.get(format_).of([self.tensors[key] for key in some], shape)
            for format_, some, shape in zip(made.formats, keys, shapes, strict=True)
        ]
        return source.keeper.out_of(sum_, parts) if all(part.problem() is None for part in parts) else None


def _keys(name: str, made: Made) -> list[list[str]]:
    """Return the keys of each part's tensors."""
    formats = enumerate(made.formats)
    return [[f"{name}/{place}/{tensor}" for tensor in FORMATS.get(format_).part_names] for place, format_ in formats]


def deriving(items: Sequence[T], weights: int) -> Iterable[T]:
    """Yield sites, or what stands for them, whose parts are then made, and show progress where that takes seconds.

    Args:
        items: They.
        weights: How many weights the sites have whose parts are made.
    """
    return track(items, "deriving weights", show=weights > SLOW_WEIGHTS)
