"""Profiles: what calibration made, in a small folder that names its base model.

profile.json          what was calibrated, on what, with which settings; the fingerprint's structure
profile.safetensors   weights and threshold curves of every FFN; the fingerprint's sampled weights
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from countdown.config import check_fields
from countdown.errors import ConfigError, ProfileError, ProfileWarning
from countdown.methods import Method, parse_method
from countdown.models.ffn import GatedFFN
from countdown.models.fingerprint import SAMPLES, structure, weights_agree

FORMAT = "countdown-profile"
VERSION = 1
_JSON, _TENSORS = "profile.json", "profile.safetensors"


@dataclass(frozen=True)
class Site:
    """What one FFN needs.

    Args:
        weights: What the indicator of each neuron is multiplied by, float32 `[h]`; None for 1.
        thresholds: τ for sparsities 0, 1/n, ..., (n-1)/n, float32 `[n]`, the first -1; None for a method that
            does not offer that decision.
    """

    weights: Tensor | None = None
    thresholds: Tensor | None = None


@dataclass(frozen=True)
class Entry:
    """One method and the modules it applies to.

    Args:
        pattern: Shell-style pattern of module names, e.g. `model.layers.*.mlp`.
        method: The method with its settings.
        sites: By module name.
    """

    pattern: str
    method: Method
    sites: dict[str, Site]


@dataclass(frozen=True)
class Profile:
    """What calibration made.

    Args:
        base_model: `name` and, where known, `revision`, `model_type`.
        structure: See `models.fingerprint.structure`.
        samples: By FFN, weights sampled from the base model, float32 `[3, n]`.
        calibration: Text, tokens, dtype and versions: what is needed to repeat it.
        entries: Methods by module pattern; the first whose pattern matches applies.
    """

    base_model: dict[str, Any]
    structure: dict[str, Any]
    samples: dict[str, Tensor]
    calibration: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)

    def with_settings(self, **settings: Any) -> Profile:
        """Return a profile with other settings of its methods, as far as its statistics allow.

        Args:
            **settings: `sparsity`, `decision`; any field of the methods but the weighting, which is calibrated.

        Raises:
            ConfigError: A setting is unknown, out of range, or needs a new calibration.
        """
        entries = []
        for entry in self.entries:
            check_fields(f"method '{entry.method.name}'", settings, [f.name for f in fields(entry.method)])
            if settings.get("weighting", entry.method.weighting) != entry.method.weighting:
                raise ConfigError("the weighting is part of a profile's calibration; calibrate again to change it.")
            entries.append(replace(entry, method=replace(entry.method, **settings)))
        return replace(self, entries=entries)

    def selector(self, ffn: GatedFFN) -> tuple[Method, Tensor] | None:
        """Return the method for `ffn` and its `per_neuron` tensor (see `ops.schema`), or None where no entry matches.

        Raises:
            ProfileError: The method decides by threshold and the profile has no thresholds for this FFN.
        """
        for entry in self.entries:
            if fnmatchcase(ffn.name, entry.pattern):
                return entry.method, _per_neuron(ffn, entry.method, entry.sites.get(ffn.name, Site()))
        return None

    def check(self, model: nn.Module, ffns: list[GatedFFN]) -> None:
        """Raise if the profile belongs to another structure; warn if the weights differ.

        Raises:
            ProfileError: Another class, other FFNs or other shapes.
        """
        found = structure(model, ffns)
        if found != self.structure:
            raise ProfileError(
                f"the profile belongs to another model: it was made for {_shape(self.structure)} "
                f"({self.base_model.get('name', 'unnamed')}), this is {_shape(found)}."
            )
        if not weights_agree(ffns, self.samples):
            warnings.warn(
                f"the weights differ from those the profile was calibrated on ({self.base_model.get('name')}); "
                "sparsity and quality may be off: calibrate on this model.",
                ProfileWarning,
                stacklevel=3,
            )

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the profile to a folder: whole, or not at all.

        Args:
            path: The folder to make.
            overwrite: Replace a profile that is there. Anything else that is there is never replaced.

        Returns:
            The folder.

        Raises:
            ProfileError: The path is taken or cannot be written.
        """
        path = Path(path)
        check_free(path, overwrite=overwrite)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A sibling, so that the final rename stays on one file system.
            scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        except OSError as error:
            raise ProfileError(f"profile {path} cannot be written: {error}.") from error
        try:
            new = scratch / "new"
            new.mkdir()
            header = json.dumps(self._header(), indent=2, ensure_ascii=False)
            (new / _JSON).write_text(header + "\n", encoding="utf-8")
            (new / _TENSORS).write_bytes(save_tensors(self._tensors()))
            _swap(new, path, scratch / "old")
        except OSError as error:
            raise ProfileError(f"profile {path} cannot be written: {error}.") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ProfileError: No profile, a damaged one, or one written by a newer countdown.
            ConfigError: It names a method that is not installed.
        """
        path = Path(path)
        if not (path / _JSON).is_file():
            raise ProfileError(f"{path} is not a profile: it has no {_JSON}. Make one with: countdown calibrate MODEL")
        try:
            header = json.loads((path / _JSON).read_text(encoding="utf-8"))
            tensors = load_file(path / _TENSORS)
            return cls._parse(header, tensors)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ProfileError(f"profile {path} is damaged: {type(error).__name__}: {error}") from error

    def _header(self) -> dict[str, Any]:
        from countdown import __version__

        return {
            "format": FORMAT,
            "version": VERSION,
            "countdown": __version__,
            "base_model": self.base_model,
            "calibration": self.calibration,
            "structure": self.structure,
            "entries": [{"pattern": e.pattern, "method": e.method.to_dict()} for e in self.entries],
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"sample/{name}": sample for name, sample in self.samples.items()}
        for index, entry in enumerate(self.entries):
            for name, site in entry.sites.items():
                for part, tensor in vars(site).items():
                    if tensor is not None:
                        tensors[f"entry/{index}/{name}/{part}"] = tensor
        return tensors

    @classmethod
    def _parse(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Profile:
        if header.get("format") != FORMAT:
            raise ProfileError(f"this is not a countdown profile: format is {header.get('format')!r}.")
        if header["version"] > VERSION:
            raise ProfileError(
                f"the profile has version {header['version']}, this countdown reads up to {VERSION}: upgrade it."
            )
        known = ("format", "version", "countdown", "base_model", "calibration", "structure", "entries")
        check_fields("profile.json", header, known)
        sites: list[dict[str, dict[str, Tensor]]] = [{} for _ in header["entries"]]
        samples: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "sample":
                samples[rest] = tensor
            else:
                index, name, part = rest.split("/")
                sites[int(index)].setdefault(name, {})[part] = tensor
        entries = [
            Entry(entry["pattern"], parse_method(entry["method"]), {n: Site(**parts) for n, parts in by_name.items()})
            for entry, by_name in zip(header["entries"], sites, strict=True)
        ]
        profile = cls(header["base_model"], header["structure"], samples, header["calibration"], entries)
        _check_contents(profile)
        return profile


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise ProfileError unless a profile may be written to `path`."""
    if path.exists():
        if not overwrite:
            raise ProfileError(f"{path} exists already; give another path or --overwrite (overwrite=True).")
        if not path.is_dir() or {inside.name for inside in path.iterdir()} != {_JSON, _TENSORS}:
            raise ProfileError(
                f"{path} is not a profile and nothing else, so it is not overwritten; give another path."
            )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ProfileError(f"{path} cannot be written: {parent} is not a folder that you may write to.")


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put `new` in the place of `path`; when that fails or is interrupted, what was there is there again."""
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise


def _check_contents(profile: Profile) -> None:
    """Raise ValueError unless structure, samples and statistics are whole and fit together."""
    known = profile.structure
    facts = (profile.base_model, profile.calibration, profile.calibration.get("text"))
    _require(all(isinstance(fact, dict) for fact in facts), "it does not say what it was calibrated on")
    _require(set(known) == {"class", "ffns"} and bool(known["ffns"]), "its structure is not that of a model")
    _require(set(profile.samples) == set(known["ffns"]), "its weight samples do not match its FFNs")
    for name, sample in profile.samples.items():
        _require(sample.shape == (3, SAMPLES) and _finite(sample), f"the weight sample of {name} is not valid")
    for entry in profile.entries:
        _require(isinstance(entry.pattern, str), "a pattern is not text")
        _require(set(entry.sites) <= set(known["ffns"]), "it has statistics of FFNs that it does not list")
        for name, shape in known["ffns"].items():
            if fnmatchcase(name, entry.pattern):
                _check_site(name, entry.sites.get(name, Site()), shape["h"], entry.method)


def _check_site(name: str, site: Site, h: int, method: Method) -> None:
    weights, curve = site.weights, site.thresholds
    _require((weights is not None) == (method.weighting != "none"), f"weights of {name} and weighting disagree")
    if weights is not None:
        _require(weights.shape == (h,), f"weights of {name} have shape {tuple(weights.shape)}, expected {(h,)}")
        _require(_finite(weights) and bool((weights >= 0).all()), f"weights of {name} are NaN, infinite or negative")
    if curve is not None:
        _require(curve.dim() == 1 and len(curve) > 1, f"thresholds of {name} are not a curve")
        _require(_finite(curve) and bool((curve.diff() >= 0).all()), f"thresholds of {name} are NaN or fall")


def _finite(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _per_neuron(ffn: GatedFFN, method: Method, site: Site) -> Tensor:
    weights = torch.ones(ffn.h) if site.weights is None else site.weights
    if method.decision == "topk":
        return weights
    if site.thresholds is None:
        raise ProfileError(f"the profile has no thresholds for {ffn.name}; calibrate again.")
    return _thresholds(_interpolate(site.thresholds, method.sparsity), weights)


def _interpolate(curve: Tensor, sparsity: float) -> float:
    """Return τ at a sparsity: -1 at 0, and past the curve's last point that point."""
    if sparsity == 0:
        return -1.0
    position = min(sparsity * len(curve), len(curve) - 1)
    # The first point stands for "nothing dropped"; below one step it is 0, the smallest magnitude.
    low, high = curve.clamp(min=0)[[int(position), min(int(position) + 1, len(curve) - 1)]].tolist()
    return float(low + (high - low) * (position - int(position)))


def _thresholds(tau: float, weights: Tensor) -> Tensor:
    """Return τ_i, float32 `[h]`: inactive iff indicator · m_i ≤ τ, so τ_i = τ / m_i, and +inf where m_i = 0."""
    if tau < 0:
        return torch.full_like(weights, -1.0)
    return torch.where(weights == 0, torch.inf, tau / weights)


def _shape(found: Mapping[str, Any]) -> str:
    ffns = list(found["ffns"].values())
    return f"{found['class']} with {len(ffns)} FFNs of d {ffns[0]['d']}, h {ffns[0]['h']}, {ffns[0]['activation']}"
