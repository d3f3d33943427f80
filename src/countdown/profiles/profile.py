"""Profiles: what calibration made, in a small folder that names its base model.

profile.json          what was calibrated, on what, with which settings; the fingerprint's structure
profile.safetensors   artifacts of every site (see `countdown.artifacts`); the fingerprint's sampled weights
derived.safetensors   weights derived from the model's, where they are stored (`with_derived`)
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from countdown.allocation import ALLOCATIONS, Problem
from countdown.artifacts import MULTIPLIERS, NORMS, POINTS, SECOND_THRESHOLDS, THRESHOLDS, Artifacts, value_at
from countdown.config import check_fields
from countdown.cost import saved_bytes
from countdown.errors import OVERWRITE, AccidentError, ConfigError, ProfileError, ProfileWarning
from countdown.files import reason, unwritable, whole_folder
from countdown.memory import memory_for
from countdown.methods import Method, parse_method
from countdown.profiles import stored
from countdown.profiles.recipe import Recipe, RecipeEntry, match, own_settings
from countdown.profiles.stored import Source, StoredParts, sources_of
from countdown.sites import SITES, Site, find_sites
from countdown.sites.fingerprint import SAMPLES, structure, weights_agree
from countdown.weights import Weight
from countdown.wrappers import base_model

FORMAT = "countdown-profile"
# What a file that is not what it says can raise while it is read.
_UNREADABLE = (
    OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
VERSION = 2
# What artifacts were called in version 1.
_RENAMED = {"weights": MULTIPLIERS.name}
FILES = _JSON, _TENSORS = "profile.json", "profile.safetensors"
DERIVED = stored.FILE


@dataclass(frozen=True)
class Setting:
    """What a sparse module needs from a profile.

    Args:
        method: The method, its sparsity the module's own share of what is allocated.
        per_term: Thresholds or multipliers, float32 `[terms]` or `[2, terms]`; see `ops.call`.
        artifacts: What calibration left for the site.
        stored: Parts that are stored, by what keeps them; see `Method.keepers`.
    """

    method: Method
    per_term: Tensor
    artifacts: Artifacts
    stored: Mapping[str, Sequence[Weight]]

    @property
    def makes_parts(self) -> bool:
        """Whether parts are made that are not stored."""
        return any(keeper.derived and role not in self.stored for role, keeper in self.method.keepers.items())


@dataclass(frozen=True)
class Entry:
    """One method and the modules it applies to.

    Args:
        pattern: Shell-style pattern of module names, e.g. `*.mlp`.
        method: The method with its settings.
        sites: Artifacts by module name.
    """

    pattern: str
    method: Method
    sites: dict[str, Artifacts] = field(repr=False)

    def with_settings(self, settings: Mapping[str, Any]) -> Entry:
        """Return it with other settings.

        Raises:
            ConfigError: See `Profile.with_settings`.
        """
        for name in (*self.method.calibrated, *self.method.fitted):
            if name in settings and settings[name] != getattr(self.method, name):
                raise ConfigError(f"{name} is part of a profile's calibration; calibrate again to change it.")
        return replace(self, method=replace(self.method, **settings))


@dataclass(frozen=True, repr=False)
class Profile:
    """What calibration made.

    Args:
        base_model: `name` and, where known, `revision`, `model_type`.
        structure: See `sites.fingerprint.structure`.
        samples: By site, weights sampled from the base model, float32 `[matrices, n]`.
        calibration: Text, tokens, dtype and versions: what is needed to repeat it.
        entries: Methods by module pattern, as in a recipe.
        derived: Weights derived from the model's that are stored with it, if any.
        allocation: Of one budget for all entries, if they have one; see `Recipe`.
    """

    base_model: dict[str, Any]
    structure: dict[str, Any]
    samples: dict[str, Tensor]
    calibration: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    derived: StoredParts | None = None
    allocation: str | None = None

    def __repr__(self) -> str:
        """Return one line: its tensors would fill pages."""
        sites = len({name for entry in self.entries for name in entry.sites})
        stored = ", with derived weights" if self.derived else ""
        name = self.base_model.get("name", "an unnamed model")
        return f"<Profile of {name}: {self.recipe}; {sites} modules{stored}>"

    def with_derived(self, model: nn.Module) -> Profile:
        """Return a profile that holds the weights its methods derive from this model's, and stores them when saved.

        They are proxies and low ranks, those of the sparsity that it has now. `sparsify_` then takes them as they are,
        low ranks also at a higher sparsity. What does not fit is made anew, with a warning, as if it were not there.

        Args:
            model: Dense.

        Raises:
            ConfigError: No method derives weights.
            AccidentError: Memory runs out.
            ProfileError: The profile belongs to another model.
            UnsupportedModelError: The model has none of the profile's modules.

        Example:
            profile.with_derived(model).save("my-profile")
        """
        if not self.derives:
            raise ConfigError("no method of this profile derives weights that could be stored.")
        base = base_model(model)
        sites = find_sites(base, self.kinds)
        self.check(base, sites)
        sources = [source for chosen in self._chosen(sites) for source in sources_of(*chosen)]
        with memory_for(sum(source.part_bytes for source in sources)):
            return replace(self, derived=StoredParts.make(sources))

    @property
    def derives(self) -> bool:
        """Whether one of its methods derives weights from the model's, which can be stored."""
        return self.recipe.derives

    def with_name(self, name: str) -> Profile:
        """Return a profile whose base model has this name: transformers names a GGUF model after its folder."""
        return replace(self, base_model=self.base_model | {"name": name})

    def with_settings(self, **settings: Any) -> Profile:
        """Return a profile with other settings of its methods, as far as its statistics allow.

        Args:
            **settings: `sparsity`, `decision`, `allocation`; any field of the methods but what is calibrated, such as
                the weighting.

        Raises:
            ConfigError: A setting is unknown, out of range, or needs a new calibration.

        Example:
            profile.with_settings(sparsity=0.8, decision="topk").save("my-profile-80")
        """
        entries = [entry.with_settings(own_settings(entry.method, settings, self.entries)) for entry in self.entries]
        return replace(self, entries=entries, allocation=self.recipe.with_settings(**settings).allocation)

    @property
    def recipe(self) -> Recipe:
        """What was calibrated, with the settings it has now."""
        return Recipe(tuple(RecipeEntry(entry.method, entry.pattern) for entry in self.entries), self.allocation)

    @property
    def kinds(self) -> list[str]:
        """The kinds of sites that its methods apply to."""
        return self.recipe.kinds

    def settings(self, sites: Sequence[Site]) -> dict[str, Setting]:
        """Return, for each site that an entry takes, what its sparse module needs.

        Raises:
            ProfileError: No entry takes any site, or the profile lacks what an entry's decision or allocation needs.
        """
        found = {}
        for site, method, artifacts in self._chosen(sites):
            per_term = _per_term(site.name, method, artifacts, self._axes(site.name)["terms"])
            stored = self._stored(sources_of(site, method, artifacts))
            found[site.name] = Setting(method, per_term, artifacts, stored)
        self._warn_of_left_out(found)
        if self.derived and any(one.makes_parts for one in found.values()):
            warnings.warn(
                "derived weights that are stored do not fit these weights, this calibration or this sparsity, so they "
                "are made anew; store them again (with_derived, --include-derived) to load as quickly as before.",
                ProfileWarning,
                stacklevel=4,
            )
        return found

    def _warn_of_left_out(self, settings: Mapping[str, Setting]) -> None:
        """Warn of sites to which nothing is added though their entry says so."""
        wanted = {name for entry in self.entries if entry.method.fitted for name in entry.sites}
        dropping = {name for name in wanted & settings.keys() if settings[name].method.sparsity > 0}
        left_out = [name for name in dropping if not settings[name].method.fitted]
        if left_out:
            warnings.warn(
                f"of {len(left_out)} of {len(wanted)} modules nothing is predicted: their sparsity is below all that "
                "the profile has fits for. Calibrate at this sparsity.",
                ProfileWarning,
                stacklevel=5,
            )

    def _chosen(self, sites: Sequence[Site]) -> list[tuple[Site, Method, Artifacts]]:
        """Return the sites that entries take, each with its method and its artifacts."""
        by_name = {site.name: site for site in sites}
        taken = _taken(self.entries, {site.name: site.kind for site in sites})
        sizes = {name: saved_bytes(by_name[name], entry.method) for entry in taken for name in entry.sites}
        sparsities = allocated(taken, sizes, self.allocation)
        return [
            (by_name[name], entry.method.at(name, sparsities[name]).with_artifacts(artifacts), artifacts)
            for entry in taken
            for name, artifacts in entry.sites.items()
        ]

    def _stored(self, sources: Sequence[Source]) -> dict[str, Sequence[Weight]]:
        """Return what is stored of the parts of a site, by what keeps them."""
        found = {} if self.derived is None else {source.role: self.derived.of(source) for source in sources}
        return {role: parts for role, parts in found.items() if parts is not None}

    def _axes(self, name: str) -> dict[str, int]:
        """Return the sizes of the axes of a site's artifacts."""
        shape = self.structure["sites"][name]
        return {**SITES.get(shape["kind"]).site.axes(shape), "points": POINTS}

    def check(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Raise if the profile belongs to another structure; warn if the weights differ.

        Raises:
            ProfileError: Another class, other sites or other shapes; or other weights, where something was fitted to
                these.
        """
        found = structure(model, sites)
        if found != self.structure:
            raise ProfileError(
                f"the profile belongs to another model: it was made for {_shape(self.structure)} "
                f"({self.base_model.get('name', 'unnamed')}), this is {_shape(found)}."
            )
        if weights_agree(sites, self.samples):
            return
        if any(entry.method.fitted for entry in self.entries):
            raise ProfileError(
                f"the weights differ from those the profile was calibrated on ({self.base_model.get('name')}), and "
                "what it predicts of dropped neurons is theirs: calibrate on this model."
            )
        warnings.warn(
            f"the weights differ from those the profile was calibrated on ({self.base_model.get('name')}); "
            "sparsity and quality may be off: calibrate on this model.",
            ProfileWarning,
            stacklevel=4,
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the profile to a folder: whole, or not at all.

        Args:
            path: The folder to make.
            overwrite: Replace a profile that is there. Anything else that is there is never replaced.

        Returns:
            The folder.

        Raises:
            ProfileError: The path is taken, or nothing can be written there.
            AccidentError: Writing failed: no space is left, for example.
        """
        path = Path(path)
        check_free(path, overwrite=overwrite)
        self.put(path)
        return path

    def put(self, path: Path) -> None:
        """Write the profile to a folder in the place of whatever is there: whole, or not at all.

        Raises:
            AccidentError: It cannot be written.
        """
        try:
            with whole_folder(path) as new:
                header = json.dumps(self._header(), indent=2, ensure_ascii=False)
                (new / _JSON).write_text(header + "\n", encoding="utf-8")
                (new / _TENSORS).write_bytes(save_tensors(self._tensors()))
                if self.derived:
                    self.derived.save(new / DERIVED)
        except (OSError, SafetensorError) as error:
            raise AccidentError(f"profile {path} cannot be written: {reason(error)}.") from error

    @classmethod
    def of(cls, profile: Profile | str | Path, *, model: str = "MODEL") -> Profile:
        """Return a profile as it is, or the one in a folder.

        Args:
            profile: It or the folder.
            model: See `load`.

        Raises:
            ProfileError, ConfigError: It is neither, or see `load`.
        """
        if isinstance(profile, str | Path):
            return cls.load(profile, model=model)
        if not isinstance(profile, Profile):
            raise ProfileError(
                f"the profile is of type {type(profile).__name__}, expected what countdown.calibrate returns, or the "
                "folder of one."
            )
        return profile

    @classmethod
    def load(cls, path: str | Path, *, model: str = "MODEL") -> Profile:
        """Read a profile.

        Args:
            path: Its folder.
            model: Whose profile it is to be, for the command that errors suggest.

        Raises:
            ProfileError: No profile, a damaged one, or one written by a newer countdown.
            ConfigError: It names a method that is not installed.
        """
        path = Path(path)
        if not (path / _JSON).is_file():
            raise ProfileError(_no_profile(path, model))
        try:
            header = json.loads((path / _JSON).read_text(encoding="utf-8-sig"))
            tensors = load_file(path / _TENSORS)
            derived = StoredParts.load(path / DERIVED) if (path / DERIVED).is_file() else None
            return replace(cls._parse(header, tensors), derived=derived)
        except _UNREADABLE as error:
            if isinstance(error, ConfigError):
                raise
            raise ProfileError(
                f"profile {path} is damaged: {type(error).__name__}: {error}. Make it again: "
                f"{_how_to_make(path, model, '--overwrite')}"
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
            **({"allocation": self.allocation} if self.allocation else {}),
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"sample/{name}": sample for name, sample in self.samples.items()}
        for index, entry in enumerate(self.entries):
            for name, site in entry.sites.items():
                tensors |= {f"entry/{index}/{name}/{artifact}": tensor for artifact, tensor in site.items()}
        return tensors

    @classmethod
    def _parse(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Profile:
        if header.get("format") != FORMAT:
            raise ProfileError(f"this is not a countdown profile: format is {header.get('format')!r}.")
        version = header["version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"version is {version!r}")
        if version > VERSION:
            raise ProfileError(f"the profile has version {version}, this countdown reads up to {VERSION}: upgrade it.")
        known = ("format", "version", "countdown", "base_model", "calibration", "structure", "entries", "allocation")
        check_fields("profile.json", header, known)
        sites: list[dict[str, dict[str, Tensor]]] = [{} for _ in header["entries"]]
        samples: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "sample":
                samples[rest] = tensor
            else:
                index, name, artifact = rest.split("/")
                if kind != "entry" or not index.isdecimal():
                    raise ValueError(f"tensor '{key}' belongs to no entry")
                artifact = _RENAMED.get(artifact, artifact) if version == 1 else artifact
                sites[int(index)].setdefault(name, {})[artifact] = tensor
        entries = [
            Entry(entry["pattern"], parse_method(entry["method"]), dict(by_name))
            for entry, by_name in zip(header["entries"], sites, strict=True)
        ]
        facts = (header["base_model"], header["structure"], samples, header["calibration"])
        profile = cls(*facts, entries, allocation=header.get("allocation"))
        _check_contents(profile)
        return profile


def _no_profile(path: Path, model: str) -> str:
    """Return what is said of a path with no profile, which is made there only where nothing else is."""
    if path.exists():
        return f"{path} is not a profile: it has no {_JSON}. Give the folder of one, as countdown calibrate makes them."
    return f"{path} is not a profile: nothing is there. Make it with: {_how_to_make(path, model)}"


def _how_to_make(path: Path, model: str, *more: str) -> str:
    return shlex.join(["countdown", "calibrate", model, "-o", str(path), *more])


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise ProfileError unless a profile may be written to `path`."""
    if path.exists():
        if not overwrite:
            raise ProfileError(f"{path} exists already; give another path or {OVERWRITE}.")
        inside = {file.name for file in path.iterdir()} if path.is_dir() else set()
        # One that lost its tensors is a profile still: to make it again is what its reader is told.
        if _JSON not in inside or inside - {_JSON, _TENSORS, DERIVED}:
            raise ProfileError(
                f"{path} is not a profile and nothing else, so it is not overwritten; give another path."
            )
    if problem := unwritable(path):
        raise ProfileError(problem)


def allocated(entries: Sequence[Entry], sizes: Mapping[str, int], allocation: str | None = None) -> dict[str, float]:
    """Return the sparsity of each site.

    Args:
        entries: The entries.
        sizes: What sparsity saves of each site, by name; see `Problem`.
        allocation: Of one budget for all entries, None where each has its own.

    Raises:
        ProfileError: A site lacks what its allocation needs.
        ConfigError: An allocation gives no sparsity that a module can have.
    """
    if allocation is not None:
        sites = {name: found for entry in entries for name, found in entry.sites.items()}
        return _of_budget(allocation, entries[0].method.sparsity, sites, sizes)
    budgets = [_of_budget(one.method.allocation, one.method.sparsity, one.sites, sizes) for one in entries]
    return {name: sparsity for found in budgets for name, sparsity in found.items()}


def _of_budget(
    allocation: str, sparsity: float, sites: Mapping[str, Artifacts], sizes: Mapping[str, int]
) -> dict[str, float]:
    problem = Problem(sparsity, {name: sizes[name] for name in sites}, sites)
    found = ALLOCATIONS.get(allocation).allocate(problem)
    wrong = [name for name in sites if not 0 <= found.get(name, -1.0) < 1]
    if wrong := wrong or [name for name in found if name not in sites]:
        raise ConfigError(f"allocation '{allocation}' gives {wrong[0]} no sparsity of 0 or more and below 1.")
    return found


def _taken(entries: Sequence[Entry], kinds: Mapping[str, str]) -> list[Entry]:
    """Return the entries, each with the artifacts of the sites that it takes now."""
    try:
        owners = match([(entry.pattern, entry.method.kind) for entry in entries], list(kinds.items()))
    except ConfigError as error:
        raise ProfileError(str(error)) from error
    return [
        replace(entry, sites={name: entry.sites.get(name, {}) for name, o in owners.items() if o == index})
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
        matrices = len(SITES.get(known["sites"][name]["kind"]).site.sum_class.roles)
        whole = sample.shape == (matrices, SAMPLES) and _finite(sample)
        _require(whole, f"the weight sample of {name} is not valid")
    for entry in profile.entries:
        _require(isinstance(entry.pattern, str), "a pattern is not text")
        _require(set(entry.sites) <= set(known["sites"]), "it has artifacts of modules that it does not list")
    for entry in _taken(profile.entries, {name: shape["kind"] for name, shape in known["sites"].items()}):
        for name, found in entry.sites.items():
            _check_artifacts(name, found, profile._axes(name), entry.method)


def _check_artifacts(name: str, found: Artifacts, axes: Mapping[str, int], method: Method) -> None:
    declared = {artifact.name: artifact for artifact in method.artifacts()}
    for artifact in declared.values():
        problem = artifact.problem(found.get(artifact.name), axes)
        _require(problem is None, f"{artifact.name} of {name} {problem}")
    disagreement = method.disagreement(found)
    _require(disagreement is None, f"{disagreement} of {name}")
    known = {*declared, *(one.name for allocation in ALLOCATIONS for one in allocation.artifacts)}
    unknown = [artifact for artifact in found if artifact not in known]
    _require(not unknown, f"{', '.join(unknown)} of {name} and its method disagree")


def _finite(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and bool(tensor.isfinite().all())


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _per_term(name: str, method: Method, found: Artifacts, terms: int) -> Tensor:
    multipliers = found.get(MULTIPLIERS.name)
    multipliers = torch.ones(terms, dtype=torch.float32, device="cpu") if multipliers is None else multipliers
    if method.decision == "topk":
        return multipliers
    if method.dropped >= 1:
        return torch.full_like(multipliers, torch.inf)
    if THRESHOLDS.name not in found:
        raise ProfileError(f"the profile has no thresholds for {name}; calibrate again.")
    first, *others = method.drops
    thresholds = _thresholds(value_at(found[THRESHOLDS.name], first), multipliers)
    if not others:
        return thresholds
    norms = found.get(NORMS.name, torch.ones_like(multipliers))
    second = _thresholds(value_at(found[SECOND_THRESHOLDS.name], method.dropped), norms)
    return torch.stack([thresholds, second])


def _thresholds(tau: float, multipliers: Tensor) -> Tensor:
    """Return τ_i, float32 `[terms]`: inactive iff indicator · m_i ≤ τ, so τ_i = τ / m_i, and +inf where m_i = 0."""
    if tau < 0:
        return torch.full_like(multipliers, -1.0)
    return torch.where(multipliers == 0, torch.inf, tau / multipliers)


def _shape(found: Mapping[str, Any]) -> str:
    sites = list(found["sites"].values())
    first = ", ".join(f"{key} {value}" for key, value in sites[0].items())
    return f"{found['class']} with {len(sites)} modules of {first}"
