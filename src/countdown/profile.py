"""Profiles: what calibration made, in a small folder that names its base model.

profile.json          what was calibrated, on what, with which settings; the fingerprint's structure
profile.safetensors   weights, threshold and error curves of every site; the fingerprint's sampled weights
proxy.safetensors     proxies, where they are stored (`with_proxies`)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from countdown import stored_proxies
from countdown.allocation import allocate
from countdown.config import check_fields
from countdown.errors import ConfigError, ProfileError, ProfileWarning
from countdown.folders import unwritable, whole_folder
from countdown.methods import Method, parse_method
from countdown.models.find import find_sites
from countdown.models.fingerprint import SAMPLES, structure, weights_agree
from countdown.models.sites import GatedFFN, Site
from countdown.ops.proxy import memory_for
from countdown.ops.proxy_format import proxy_bytes
from countdown.recipe import Recipe, RecipeEntry, match
from countdown.stored_proxies import StoredProxies
from countdown.wrappers import base_model

FORMAT = "countdown-profile"
# What a file that is not what it says can raise while it is read.
_UNREADABLE = (
    OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
VERSION = 1
# A curve has a point for each thousandth of sparsity.
POINTS = 1000
FILES = _JSON, _TENSORS = "profile.json", "profile.safetensors"
PROXIES = stored_proxies.FILE


@dataclass(frozen=True)
class Statistics:
    """What one site needs.

    Args:
        weights: What the indicator of each term is multiplied by, float32 `[terms]`; None for 1.
        thresholds: τ for sparsities 0, 0.001, ..., 0.999, float32 `[1000]`, the first -1; None for a method that
            does not offer that decision.
        errors: Estimated error at those sparsities, float32 `[1000]`, the first 0; None unless calibrated for global
            allocation.
        importance: Mean squares of the input's entries, float32 `[d]`, for a method with a proxy; else None.
    """

    weights: Tensor | None = None
    thresholds: Tensor | None = None
    errors: Tensor | None = None
    importance: Tensor | None = None


@dataclass(frozen=True)
class Selector:
    """What a sparse module needs from a profile.

    Args:
        method: The method, its sparsity the module's own share of what is allocated.
        per_term: Thresholds or weights, float32 `[terms]`; see `ops.schema`.
        importance: For a method with a proxy; see `Statistics`.
        proxy: The proxy, where it is stored; see `ops.schema`.
    """

    method: Method
    per_term: Tensor
    importance: Tensor | None = None
    proxy: list[Tensor] | None = None


@dataclass(frozen=True)
class Entry:
    """One method and the modules it applies to.

    Args:
        pattern: Shell-style pattern of module names, e.g. `*.mlp`.
        method: The method with its settings.
        sites: Its statistics by module name.
    """

    pattern: str
    method: Method
    sites: dict[str, Statistics]


@dataclass(frozen=True)
class Profile:
    """What calibration made.

    Args:
        base_model: `name` and, where known, `revision`, `model_type`.
        structure: See `models.fingerprint.structure`.
        samples: By site, weights sampled from the base model, float32 `[matrices, n]`.
        calibration: Text, tokens, dtype and versions: what is needed to repeat it.
        entries: Methods by module pattern, as in a recipe.
        proxies: Proxies that are stored with it, if any.
    """

    base_model: dict[str, Any]
    structure: dict[str, Any]
    samples: dict[str, Tensor]
    calibration: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    proxies: StoredProxies | None = field(default=None, repr=False)

    def with_proxies(self, model: nn.Module) -> Profile:
        """Return a profile that holds the proxies of this model, and stores them when it is saved.

        Raises:
            ConfigError: No method has a proxy, or memory runs out.
            ProfileError: The profile belongs to another model.
            UnsupportedModelError: The model has none of the profile's modules.
        """
        if not self.has_proxy:
            raise ConfigError("no method of this profile has a proxy to store.")
        base = base_model(model)
        sites = find_sites(base, self.kinds)
        self.check(base, sites)
        by_name = {site.name: site for site in sites}
        sources = {
            name: (ffn, found.importance, entry.method.proxy_bits)
            for entry in self.entries
            for name, found in entry.sites.items()
            if isinstance(ffn := by_name.get(name), GatedFFN) and found.importance is not None
        }
        with memory_for(sum(proxy_bytes(ffn.h, ffn.d, bits) for ffn, _, bits in sources.values())):
            return replace(self, proxies=StoredProxies.make(sources))

    @property
    def has_proxy(self) -> bool:
        """Whether one of its methods decides by a proxy."""
        return any(entry.method.proxy_bits for entry in self.entries)

    def with_settings(self, **settings: Any) -> Profile:
        """Return a profile with other settings of its methods, as far as its statistics allow.

        Args:
            **settings: `sparsity`, `decision`, `allocation`; any field of the methods but what is calibrated, such as
                the weighting.

        Raises:
            ConfigError: A setting is unknown, out of range, or needs a new calibration.
        """
        entries = []
        for entry in self.entries:
            check_fields(f"method '{entry.method.name}'", settings, [f.name for f in fields(entry.method)])
            for name in entry.method.calibrated:
                if name in settings and settings[name] != getattr(entry.method, name):
                    raise ConfigError(f"{name} is part of a profile's calibration; calibrate again to change it.")
            entries.append(replace(entry, method=replace(entry.method, **settings)))
        return replace(self, entries=entries)

    @property
    def recipe(self) -> Recipe:
        """What was calibrated, with the settings it has now."""
        return Recipe(tuple(RecipeEntry(entry.method, entry.pattern) for entry in self.entries))

    @property
    def kinds(self) -> list[str]:
        """The kinds of sites that its methods apply to."""
        return list(dict.fromkeys(entry.method.kind for entry in self.entries))

    def selectors(self, sites: Sequence[Site]) -> dict[str, Selector]:
        """Return, for each site that an entry takes, what its sparse module needs.

        Raises:
            ProfileError: No entry takes any site, or the profile lacks what an entry's decision or allocation needs.
        """
        sizes = {site.name: site.size for site in sites}
        by_name = {site.name: site for site in sites}
        chosen = {}
        for entry in _taken(self.entries, {site.name: site.kind for site in sites}):
            for name, sparsity in allocated(entry, sizes).items():
                method = replace(entry.method, sparsity=sparsity)
                found = entry.sites[name]
                per_term = _per_term(name, method, found, self._terms(name))
                proxy = self._stored(by_name[name], found.importance, method.proxy_bits)
                chosen[name] = Selector(method, per_term, found.importance, proxy)
        if self.proxies and any(found.importance is not None and found.proxy is None for found in chosen.values()):
            warnings.warn(
                "stored proxies do not fit these weights and this calibration, so proxies are made anew; store them "
                "again (with_proxies, --include-proxy) to load as quickly as before.",
                ProfileWarning,
                stacklevel=4,
            )
        return chosen

    def _stored(self, site: Site, importance: Tensor | None, bits: int) -> list[Tensor] | None:
        if self.proxies is None or importance is None or not isinstance(site, GatedFFN):
            return None
        return self.proxies.of(site, importance, bits)

    def _terms(self, name: str) -> int:
        shape = self.structure["sites"][name]
        return int(shape["h"] if "h" in shape else shape["d"])

    def check(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Raise if the profile belongs to another structure; warn if the weights differ.

        Raises:
            ProfileError: Another class, other sites or other shapes.
        """
        found = structure(model, sites)
        if found != self.structure:
            raise ProfileError(
                f"the profile belongs to another model: it was made for {_shape(self.structure)} "
                f"({self.base_model.get('name', 'unnamed')}), this is {_shape(found)}."
            )
        if not weights_agree(sites, self.samples):
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
            with whole_folder(path) as new:
                header = json.dumps(self._header(), indent=2, ensure_ascii=False)
                (new / _JSON).write_text(header + "\n", encoding="utf-8")
                (new / _TENSORS).write_bytes(save_tensors(self._tensors()))
                if self.proxies:
                    self.proxies.save(new / PROXIES)
        except (OSError, SafetensorError) as error:
            raise ProfileError(f"profile {path} cannot be written: {error}.") from error
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
            proxies = StoredProxies.load(path / PROXIES) if (path / PROXIES).is_file() else None
            return replace(cls._parse(header, tensors), proxies=proxies)
        except _UNREADABLE as error:
            if isinstance(error, ConfigError):
                raise
            raise ProfileError(
                f"profile {path} is damaged: {type(error).__name__}: {error}. Make it again: countdown calibrate MODEL"
            ) from error

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
            Entry(
                entry["pattern"],
                parse_method(entry["method"]),
                {n: Statistics(**parts) for n, parts in by_name.items()},
            )
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
        if not path.is_dir() or {inside.name for inside in path.iterdir()} - {PROXIES} != {_JSON, _TENSORS}:
            raise ProfileError(
                f"{path} is not a profile and nothing else, so it is not overwritten; give another path."
            )
    if problem := unwritable(path):
        raise ProfileError(problem)


def allocated(entry: Entry, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the sparsity of each site of an entry.

    Args:
        entry: The entry.
        sizes: Weights of each site, by name.

    Raises:
        ProfileError: The entry allocates globally and has no error estimates.
    """
    method, names = entry.method, list(entry.sites)
    if method.allocation == "uniform" or method.sparsity == 0:
        return dict.fromkeys(names, method.sparsity)
    errors = [entry.sites[name].errors for name in names]
    known = [error for error in errors if error is not None]
    if len(known) < len(names):
        raise ProfileError("the profile was not calibrated for allocation 'global'; calibrate again with it.")
    shares = allocate(torch.stack(known), torch.tensor([sizes[name] for name in names]), method.sparsity)
    return dict(zip(names, shares.tolist(), strict=True))


def threshold_at(curve: Tensor, sparsity: float) -> float:
    """Return the value of a curve (see `Statistics`) at a sparsity: its first at 0, past its last point that one."""
    if sparsity == 0:
        return float(curve[0])
    position = min(sparsity * len(curve), len(curve) - 1)
    # The first point stands for "nothing dropped"; below one step it is 0, the smallest magnitude.
    low, high = curve.clamp(min=0)[[int(position), min(int(position) + 1, len(curve) - 1)]].tolist()
    return float(low + (high - low) * (position - int(position)))


def _taken(entries: Sequence[Entry], kinds: Mapping[str, str]) -> list[Entry]:
    """Return the entries, each with the statistics of the sites that it takes now."""
    try:
        owners = match([(entry.pattern, entry.method.kind) for entry in entries], list(kinds.items()))
    except ConfigError as error:
        raise ProfileError(str(error)) from error
    return [
        replace(entry, sites={name: entry.sites.get(name, Statistics()) for name, o in owners.items() if o == index})
        for index, entry in enumerate(entries)
    ]


def _check_contents(profile: Profile) -> None:
    """Raise ValueError unless structure, samples and statistics are whole and fit together."""
    known = profile.structure
    facts = (profile.base_model, profile.calibration, *profile.calibration.get("texts", [None]))
    _require(all(isinstance(fact, dict) for fact in facts), "it does not say what it was calibrated on")
    _require(set(known) == {"class", "sites"} and bool(known["sites"]), "its structure is not that of a model")
    _require(set(profile.samples) == set(known["sites"]), "its weight samples do not match its modules")
    for name, sample in profile.samples.items():
        matrices = 3 if known["sites"][name]["kind"] == "ffn" else 1
        whole = sample.shape == (matrices, SAMPLES) and _finite(sample)
        _require(whole, f"the weight sample of {name} is not valid")
    for entry in profile.entries:
        _require(isinstance(entry.pattern, str), "a pattern is not text")
        _require(set(entry.sites) <= set(known["sites"]), "it has statistics of modules that it does not list")
    for entry in _taken(profile.entries, {name: shape["kind"] for name, shape in known["sites"].items()}):
        for name, statistics in entry.sites.items():
            _check_statistics(name, statistics, profile._terms(name), entry.method)
            _check_importance(name, statistics, int(known["sites"][name]["d"]), entry.method)


def _check_statistics(name: str, found: Statistics, terms: int, method: Method) -> None:
    weights = found.weights
    _require((weights is not None) == (method.weighting != "none"), f"weights of {name} and weighting disagree")
    if weights is not None:
        _require(weights.shape == (terms,), f"weights of {name} have shape {tuple(weights.shape)}, expected {(terms,)}")
        _require(_finite(weights) and bool((weights >= 0).all()), f"weights of {name} are NaN, infinite or negative")
    for what, curve in (("thresholds", found.thresholds), ("errors", found.errors)):
        if curve is not None:
            _require(curve.shape == (POINTS,), f"{what} of {name} are not a curve of {POINTS} points")
            _require(float(curve[0]) == (-1.0 if what == "thresholds" else 0.0), f"{what} of {name} begin elsewhere")
            _require(_finite(curve) and bool((curve.diff() >= 0).all()), f"{what} of {name} are NaN or fall")


def _check_importance(name: str, found: Statistics, d: int, method: Method) -> None:
    importance = found.importance
    _require((importance is not None) == bool(method.proxy_bits), f"importance of {name} and its method disagree")
    if importance is not None:
        _require(importance.shape == (d,), f"importance of {name} has shape {tuple(importance.shape)}, expected {(d,)}")
        _require(_finite(importance) and bool((importance >= 0).all()), f"importance of {name} is not valid")


def _finite(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _per_term(name: str, method: Method, found: Statistics, terms: int) -> Tensor:
    weights = torch.ones(terms) if found.weights is None else found.weights
    if method.decision == "topk":
        return weights
    if found.thresholds is None:
        raise ProfileError(f"the profile has no thresholds for {name}; calibrate again.")
    return _thresholds(threshold_at(found.thresholds, method.sparsity), weights)


def _thresholds(tau: float, weights: Tensor) -> Tensor:
    """Return τ_i, float32 `[terms]`: inactive iff indicator · m_i ≤ τ, so τ_i = τ / m_i, and +inf where m_i = 0."""
    if tau < 0:
        return torch.full_like(weights, -1.0)
    return torch.where(weights == 0, torch.inf, tau / weights)


def _shape(found: Mapping[str, Any]) -> str:
    sites = list(found["sites"].values())
    first = ", ".join(f"{key} {value}" for key, value in sites[0].items())
    return f"{found['class']} with {len(sites)} modules of {first}"
