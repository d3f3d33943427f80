"""Turns a model sparse and back, and says what runs where."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from safetensors import SafetensorError
from torch import nn

from countdown.config import check_choice
from countdown.cost import beside_bytes, weights_read
from countdown.errors import AccidentError, ConfigError, UnsupportedModelError
from countdown.files import reason, unwritable, whole_folder
from countdown.loading import Source, load_model, load_tokenizer
from countdown.memory import memory_for
from countdown.modules import APPLY_TO, SparseModule, check_dense, sparse_modules
from countdown.ops.cpu import library
from countdown.ops.request import REFERENCE, VARIABLE, requested
from countdown.phase import Phases
from countdown.profiles.profile import Profile
from countdown.profiles.saving import forget_profile, keep_profile, own_profile
from countdown.profiles.stored import deriving
from countdown.sequences import numbered
from countdown.sites import Site, check_untouched, find_sites
from countdown.sites.decoder import decoder_of
from countdown.wrappers import base_model

_LOG = logging.getLogger("countdown")
ModelT = TypeVar("ModelT", bound=nn.Module)


def sparsify_(
    model: ModelT, profile: Profile | str | Path, *, apply_to: str = "decode", sparsity: float | None = None
) -> ModelT:
    """Replace the model's FFNs or linears, in place, by ones that skip the terms a token does not need.

    `model.generate()` works as before. Parameters, their names and `state_dict()` stay as they are. New weights
    may be loaded into them by `load_state_dict`, but what is edited in place leaves derived weights as they were;
    hooks on an FFN's linears would be bypassed. `model.save_pretrained(dir)` writes the dense model, and the profile
    beside it, for `countdown.from_pretrained(dir)`.

    Args:
        model: A dense causal language model of transformers, in eval mode; also inside a PEFT model whose adapters
            leave the replaced modules alone (whose own `save_pretrained` writes the adapter only).
        profile: What `calibrate` made for this model, or the folder where it is saved.
        apply_to: `decode`: prompts are dense, generated tokens sparse. `all`: every token is sparse, as
            evaluation needs it.
        sparsity: Another target than the profile's, 0 ≤ sparsity < 1.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: The model is sparsified already, in training mode, or has modules that cannot be
            replaced. The model is then unchanged.
        ProfileError: The profile belongs to another model.
        ConfigError: A setting is out of range.
        AccidentError: Memory runs out.

    Example:
        countdown.sparsify_(model, profile, sparsity=0.6)
        model.generate(**tokenizer("Why is the sky blue?", return_tensors="pt"), max_new_tokens=8)
    """
    check_choice("apply_to", apply_to, APPLY_TO)
    requested()  # a name that does not exist is refused before anything is done
    check_dense(model)
    profile = Profile.of(profile)
    if sparsity is not None:
        profile = profile.with_settings(sparsity=sparsity)
    _sparsify(model, profile, find_sites(base_model(model), profile.kinds), apply_to)
    return model


def _sparsify(model: nn.Module, profile: Profile, sites: Sequence[Site], apply_to: str) -> None:
    base = base_model(model)
    profile.check(base, sites)
    # Everything that can fail comes before the first replacement.
    follows = any(entry.method.selector.from_prompt for entry in profile.entries)
    phases = Phases(numbered() if follows else 0)
    replacements = _replacements(sites, profile, phases, apply_to)
    for name, module in replacements.items():
        base.set_submodule(name, module)
    phases.watch(decoder_of(base)[0])
    _say_refusals(replacements)
    keep_profile(base, profile)
    if apply_to == "decode":
        vars(base).update({name: refuse(base) for name, refuse in _REFUSALS.items()})


def restore_(model: ModelT) -> ModelT:
    """Put the dense modules back, in place; the model computes the same bits as before `sparsify_`.

    Raises:
        UnsupportedModelError: The model is not sparsified.

    Example:
        countdown.restore_(model)
    """
    base = base_model(model)
    for name, module in _require_sparse(model).items():
        module.phases.leave(decoder_of(base)[0])
        model.set_submodule(name, module.release().train(module.training))
    forget_profile(base)
    for name in _REFUSALS:
        vars(base).pop(name, None)
    return model


def sparse_twin(model: ModelT, profile: Profile) -> ModelT:
    """Return a sparsified copy of a dense model, which stays as it is.

    The two share every weight but those that `sparsify_` stores in another layout: W_down, linears that are sparse.

    Args:
        model, profile: See `sparsify_`.

    Raises:
        UnsupportedModelError, ProfileError, ConfigError, AccidentError: See `sparsify_`.
    """
    check_dense(model)
    sites = find_sites(base_model(model), profile.kinds)
    own = {id(part) for site in sites for part in site.weights[-1].parts}
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers()) if id(tensor) not in own}
    twin = copy.deepcopy(model, shared)
    # What was proved of the one holds for the other.
    base = base_model(twin)
    _sparsify(twin, profile, [replace(site, module=base.get_submodule(site.name)) for site in sites], "decode")
    return twin


def from_pretrained(
    model: str,
    profile: Profile | str | Path | None = None,
    *,
    apply_to: str = "decode",
    sparsity: float | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model by hub id, folder or GGUF file, and sparsify it if there is a profile.

    Args:
        model: Hub id, folder with `config.json`, or path of a `.gguf` file (its weights are dequantised).
        profile: A profile or the folder of one; without it the one in the model's own subfolder `countdown`, and
            if it has none the model stays dense.
        apply_to, sparsity: See `sparsify_`.
        dtype: `auto` (the checkpoint's; bfloat16 for GGUF), `bfloat16`, `float16` or `float32`.
        device: `auto` (CUDA where there is one), or a torch device.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the repository ships.

    Raises:
        ConfigError: Nothing loadable under this name, or a setting is out of range.
        ProfileError, UnsupportedModelError: See `sparsify_`.

    Example:
        model = countdown.from_pretrained("my-model", "my-profile", sparsity=0.7)
    """
    check_choice("apply_to", apply_to, APPLY_TO)
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    profile = own_profile(source) if profile is None else Profile.of(profile, model=source.given)
    if profile is None and sparsity is not None:
        raise ConfigError(f"sparsity needs a profile, and {source.label} has none of its own.")
    loaded = load_model(source, dtype=dtype, device=device)
    if profile is not None:
        sparsify_(loaded, profile, apply_to=apply_to, sparsity=sparsity)
    return loaded


def export(
    model: str,
    profile: Profile | str | Path,
    path: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    include_derived: bool = False,
) -> Path:
    """Write a folder with a dense base model, its tokenizer and a profile: whole, or not at all.

    `countdown.from_pretrained(path)` loads it sparse, `AutoModelForCausalLM.from_pretrained(path)` dense.

    Args:
        model: Hub id, folder or GGUF file of the base model.
        profile: A profile that fits it, or the folder of one.
        path: The folder to make; it must not exist.
        dtype, revision, trust_remote_code: See `from_pretrained`.
        include_derived: Store what methods derive from these weights (proxies, low ranks) as well: loading is quicker,
            the folder larger.

    Raises:
        ConfigError, ProfileError, UnsupportedModelError: See `from_pretrained`; also when `path` is taken or nothing
            can be written there, or no method derives weights.
        AccidentError: Writing failed: no space is left, for example.

    Example:
        countdown.export("my-model", "my-profile", "my-sparse-model")
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path} exists already; give another path.")
    if problem := unwritable(path):
        raise ConfigError(problem)
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    profile = Profile.of(profile, model=source.given)
    if include_derived and not profile.derives:
        raise ConfigError("include_derived: no method of this profile derives weights that could be stored.")
    profile = replace(profile, derived=None)
    tokenizer = load_tokenizer(source)
    loaded: Any = load_model(source, dtype=dtype, device="cpu")
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{source.label} has adapters beside its weights; merge them (PEFT's merge_and_unload), and export the "
            "merged model."
        )
    sites = find_sites(loaded, profile.kinds)
    profile.check(loaded, sites)
    profile.settings(sites)
    keep_profile(loaded, profile.with_derived(loaded) if include_derived else profile)
    try:
        with whole_folder(path) as new:
            loaded.save_pretrained(new)
            tokenizer.save_pretrained(new)
    except (OSError, SafetensorError) as error:
        raise AccidentError(f"{path} cannot be written: {reason(error)}.") from error
    return path


@dataclass(frozen=True)
class SiteStatus:
    """What runs in place of one module.

    Args:
        name: The module's name.
        kind: `ffn` or `linear`.
        terms: Neurons of an FFN, input channels of a linear.
        size: Weights of its matrices.
        method, decision, weighting, allocation: As calibrated.
        selector: What decides.
        compensation: What is added for dropped terms, "" for nothing.
        backend: What computes: `triton`, `cpu` or `reference`.
        backend_reason: Why the reference does, None where it does not.
        apply_to: `decode` or `all`.
        target_sparsity: Asked for, of this module: global allocation gives each its own.
        realised_sparsity: Share of inactive terms over the tokens counted; None before the first. Of two looks, the
            mean of what they leave inactive, which the target is too.
        looks: Share of terms that each look leaves; None before the first token.
        tokens: Tokens computed sparsely since `sparsify_` or `reset_counters`.
        weights_read: Share of the dense weight bytes that the method reads at the realised sparsity.
        beside_bytes: What weights derived from the model's take beside them: a proxy, a low rank.
    """

    name: str
    kind: str
    terms: int
    size: int
    method: str
    selector: str
    compensation: str
    decision: str
    weighting: str
    allocation: str
    backend: str
    backend_reason: str | None
    apply_to: str
    target_sparsity: float
    realised_sparsity: float | None
    looks: list[float] | None
    tokens: int
    weights_read: float | None
    beside_bytes: int


def status(model: nn.Module) -> list[SiteStatus]:
    """Return what runs where, an entry for each sparse module, in the order of layers.

    Raises:
        UnsupportedModelError: The model is not sparsified.

    Example:
        [(site.name, site.backend, site.realised_sparsity) for site in countdown.status(model)]
    """
    return [_site_status(name, module) for name, module in _require_sparse(model).items()]


def realised_sparsity(model: nn.Module) -> float | None:
    """Return the share of terms skipped since the counters were reset, sites counting by size; None without tokens.

    Raises:
        UnsupportedModelError: The model is not sparsified.
    """
    sites = [site for site in status(model) if site.realised_sparsity is not None]
    size = sum(site.size for site in sites)
    return sum((site.realised_sparsity or 0.0) * site.size for site in sites) / size if size else None


def reset_counters(model: nn.Module) -> None:
    """Start counting tokens and active terms anew.

    Raises:
        UnsupportedModelError: The model is not sparsified.
    """
    for module in _require_sparse(model).values():
        module.counters.zero_()


def _require_sparse(model: nn.Module) -> dict[str, SparseModule]:
    modules = sparse_modules(model)
    if not modules:
        raise UnsupportedModelError("the model is not sparsified; call countdown.sparsify_(model, profile) first.")
    return modules


def _replacements(sites: Sequence[Site], profile: Profile, phases: Phases, apply_to: str) -> dict[str, SparseModule]:
    by_name = {site.name: site for site in sites}
    chosen = profile.settings(sites)
    for name in chosen:
        check_untouched(by_name[name])
    beside = sum(beside_bytes([by_name[name]], found.method) for name, found in chosen.items())
    making = sum(by_name[name].size for name, found in chosen.items() if found.makes_parts)
    with memory_for(beside):
        modules = {
            name: SparseModule(
                by_name[name],
                found.method,
                found.per_term,
                phases=phases,
                apply_to=apply_to,
                artifacts=found.artifacts,
                parts=found.stored.get("selector"),
                added=found.stored.get("compensation"),
            )
            for name, found in deriving(list(chosen.items()), making)
        }
    for name, module in modules.items():
        reason = module.planned_refusal
        if (wanted := requested()) not in (None, REFERENCE) and reason is not None:
            raise ConfigError(f"{VARIABLE} is '{wanted}', which cannot compute {name}: {reason}.")
    try:
        with memory_for(beside):
            for module in modules.values():
                module.lay_out()
    except BaseException:  # out of memory, or interrupted: the model is as it was
        for module in modules.values():
            module.release()
        raise
    return modules


def _site_status(name: str, module: SparseModule) -> SiteStatus:
    tokens, *active = module.counters.tolist()
    looks = [left / (tokens * module.terms) for left in active] if tokens else None
    method = module.method
    return SiteStatus(
        name=name,
        kind=module.kind,
        terms=module.terms,
        size=module.size,
        method=method.name,
        selector=method.selector.name,
        compensation=module.compensation,
        decision=method.decision,
        weighting=method.weighting,
        allocation=method.allocation,
        backend=module.backend,
        backend_reason=module.refusal,
        apply_to=module.apply_to,
        target_sparsity=method.sparsity,
        realised_sparsity=None if looks is None else 1 - sum(looks) / len(looks),
        looks=looks,
        tokens=tokens,
        weights_read=None if looks is None else weights_read([module.site], method, looks),
        beside_bytes=module.part_bytes,
    )


def _say_refusals(modules: Mapping[str, SparseModule]) -> None:
    """Log, once for each reason, what a GPU leaves to the reference, and once that a CPU has no kernels."""
    reasons: dict[str, list[str]] = {}
    for name, module in modules.items():
        if module.per_term.is_cuda and (reason := module.refusal):
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        _LOG.warning("the Triton backend leaves %s to the reference: %s.", _listed(names), reason)
    on_cpu = any(module.per_term.device.type == "cpu" for module in modules.values())
    if on_cpu and requested() != REFERENCE and (missing := library.missing()):
        say_once(f"the CPU backend leaves all to the reference, which gains no speed: {missing}.")


@cache
def say_once(message: str) -> None:
    """Log a warning, the first time only."""
    _LOG.warning(message)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} modules ({names[0]}, ...)"


def _refuse_assisted(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedModelError(
        "assisted decoding does not fit apply_to='decode': it checks several drafted tokens in one call, which "
        "would be computed densely, so its tokens would not be the model's own. Sparsify with apply_to='all'."
    )


def _refuse_batches(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedModelError(
        "generate_batch does not fit apply_to='decode': it puts prompts and generated tokens into one call, which "
        "would be computed densely. Call model.generate with padded prompts, or sparsify with apply_to='all'."
    )


class _RefuseWithoutCache:
    """Prepares a model's cache, if there is to be one."""

    def __init__(self, model: nn.Module) -> None:
        # Not held: a model that is let go of gives its memory back at once.
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has a copy of its own."""
        return object.__new__, (_RefuseWithoutCache,), self._model()

    def __setstate__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.use_cache is False:
            raise UnsupportedModelError(
                "use_cache=False does not fit apply_to='decode': each call is the whole text again, a prompt, which "
                "is computed densely. Pass use_cache=True, or sparsify with apply_to='all'."
            )
        model: Any = self._model()
        return type(model)._prepare_cache_for_generation(model, generation_config, *args, **kwargs)


# Under apply_to='decode', by the name that transformers looks up on the instance: when, and only when, decoding is
# assisted, requests are batched, and for every `generate`.
_REFUSALS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "_get_candidate_generator": lambda _: _refuse_assisted,
    "init_continuous_batching": lambda _: _refuse_batches,
    "_prepare_cache_for_generation": _RefuseWithoutCache,
}
