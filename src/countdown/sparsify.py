"""Turns a model sparse and back, and says what runs where."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import nn

from countdown.config import check_choice
from countdown.errors import ConfigError, ProfileError, UnsupportedModelError
from countdown.models.ffn import GatedFFN, check_untouched, find_ffns
from countdown.models.loading import Source, load_model
from countdown.modules import APPLY_TO, SparseFFN, check_dense, sparse_ffns
from countdown.profile import Profile

BACKENDS = ("reference",)
ModelT = TypeVar("ModelT", bound=nn.Module)


def sparsify_(model: ModelT, profile: Profile, *, apply_to: str = "decode", sparsity: float | None = None) -> ModelT:
    """Replace the model's FFNs, in place, by ones that skip the neurons a token does not need.

    `model.generate()` works as before. Parameters, their names and `state_dict()` stay as they are. New weights
    may be loaded into them; hooks on the FFN's linears, or other linears in their place, would be bypassed.

    Args:
        model: A dense causal language model of transformers, in eval mode.
        profile: What `calibrate` made for this model.
        apply_to: `decode`: prompts are dense, generated tokens sparse. `all`: every token is sparse, as
            evaluation needs it.
        sparsity: Another target than the profile's, 0 ≤ sparsity < 1.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: The model is sparsified already, in training mode, or has FFNs that cannot be
            replaced. The model is then unchanged.
        ProfileError: The profile belongs to another model.
        ConfigError: A setting is out of range.
    """
    check_choice("apply_to", apply_to, APPLY_TO)
    _check_backend()
    check_dense(model)
    if sparsity is not None:
        profile = profile.with_settings(sparsity=sparsity)
    ffns = find_ffns(model)
    profile.check(model, ffns)
    # Everything that can fail comes before the first replacement.
    replacements = {ffn.name: module for ffn in ffns if (module := _sparse(ffn, profile, apply_to)) is not None}
    if not replacements:
        patterns = ", ".join(entry.pattern for entry in profile.entries)
        raise ProfileError(f"no FFN of the model matches the profile's pattern: {patterns}.")
    for name, module in replacements.items():
        model.set_submodule(name, module)
    if apply_to == "decode":
        # transformers looks this hook up on the instance when, and only when, decoding is assisted.
        vars(model)["_get_candidate_generator"] = _refuse_assisted
    return model


def restore_(model: ModelT) -> ModelT:
    """Put the dense FFNs back, in place; the model computes the same bits as before `sparsify_`.

    Raises:
        UnsupportedModelError: The model is not sparsified.
    """
    for name, module in _require_sparse(model).items():
        model.set_submodule(name, module.dense.train(module.training))
    vars(model).pop("_get_candidate_generator", None)
    return model


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
    """Load a model by hub id, folder or GGUF file, and sparsify it if a profile is given.

    Args:
        model: Hub id, folder with `config.json`, or path of a `.gguf` file (its weights are dequantised).
        profile: A profile or the folder of one; without it the model stays dense.
        apply_to, sparsity: See `sparsify_`.
        dtype: `auto` (the checkpoint's; bfloat16 for GGUF), `bfloat16`, `float16` or `float32`.
        device: `auto` (CUDA where there is one), or a torch device.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the repository ships.

    Raises:
        ConfigError: Nothing loadable under this name, or a setting is out of range.
        ProfileError, UnsupportedModelError: See `sparsify_`.
    """
    if profile is None and sparsity is not None:
        raise ConfigError("sparsity needs a profile: without one the model stays dense.")
    if isinstance(profile, str | Path):
        profile = Profile.load(profile)
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    loaded = load_model(source, dtype=dtype, device=device)
    if profile is not None:
        sparsify_(loaded, profile, apply_to=apply_to, sparsity=sparsity)
    return loaded


@dataclass(frozen=True)
class SiteStatus:
    """What runs in place of one FFN.

    Args:
        name: The module's name.
        method, decision, weighting: As calibrated.
        indicator: What is compared.
        backend: What computes.
        apply_to: `decode` or `all`.
        target_sparsity: Asked for.
        realised_sparsity: Share of inactive neurons over the tokens counted; None before the first.
        tokens: Tokens computed sparsely since `sparsify_` or `reset_counters`.
        weights_read: Share of the dense weight bytes that the method reads at the realised sparsity.
    """

    name: str
    d: int
    h: int
    method: str
    indicator: str
    decision: str
    weighting: str
    backend: str
    apply_to: str
    target_sparsity: float
    realised_sparsity: float | None
    tokens: int
    weights_read: float | None


def status(model: nn.Module) -> list[SiteStatus]:
    """Return what runs where, an entry for each sparse FFN, in the order of layers.

    Raises:
        UnsupportedModelError: The model is not sparsified.
    """
    return [_site_status(name, module) for name, module in _require_sparse(model).items()]


def reset_counters(model: nn.Module) -> None:
    """Start counting tokens and active neurons anew.

    Raises:
        UnsupportedModelError: The model is not sparsified.
    """
    for module in _require_sparse(model).values():
        module.counters.zero_()


def _require_sparse(model: nn.Module) -> dict[str, SparseFFN]:
    modules = sparse_ffns(model)
    if not modules:
        raise UnsupportedModelError("the model is not sparsified; call countdown.sparsify_(model, profile) first.")
    return modules


def _sparse(ffn: GatedFFN, profile: Profile, apply_to: str) -> SparseFFN | None:
    chosen = profile.selector(ffn)
    if chosen is None:
        return None
    check_untouched(ffn)
    return SparseFFN(ffn, *chosen, apply_to=apply_to)


def _site_status(name: str, module: SparseFFN) -> SiteStatus:
    tokens, active = module.counters.tolist()
    share = active / (tokens * module.h) if tokens else None
    return SiteStatus(
        name=name,
        d=module.d,
        h=module.h,
        method=module.method.name,
        indicator=module.method.indicator.name,
        decision=module.method.decision,
        weighting=module.method.weighting,
        backend=BACKENDS[0],
        apply_to=module.apply_to,
        target_sparsity=module.method.sparsity,
        realised_sparsity=None if share is None else 1 - share,
        tokens=tokens,
        weights_read=None if share is None else module.method.indicator.weights_read(share),
    )


def _check_backend() -> None:
    wanted = os.environ.get("COUNTDOWN_BACKEND")
    if wanted and wanted not in BACKENDS:
        raise ConfigError(f"COUNTDOWN_BACKEND is '{wanted}', but this countdown has only: {', '.join(BACKENDS)}.")


def _refuse_assisted(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedModelError(
        "assisted decoding does not fit apply_to='decode': it checks several drafted tokens in one call, which "
        "would be computed densely, so its tokens would not be the model's own. Sparsify with apply_to='all'."
    )
