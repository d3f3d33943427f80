"""Which backend computes what, and why another does not; the ops of `ops.call`, registered with torch.

The reference takes every call. A backend takes those on its type of device that it has a kernel for, where it can run;
what it refuses the reference computes. Every call goes through the one adapter here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from countdown.autocast import DEVICES, without_autocast
from countdown.errors import ConfigError
from countdown.ops import dense, drawing, reference, together
from countdown.ops.base import MOST_TOKENS, Backend, in_rows
from countdown.ops.call import SCHEMAS, Call
from countdown.ops.cpu.backend import CPU
from countdown.ops.request import KNOWN, REFERENCE, VARIABLE, requested
from countdown.ops.triton.backend import Triton
from countdown.selectors import Selector
from countdown.sums import Sum
from countdown.weights import Weight

LIBRARY = torch.library.Library("countdown", "DEF")
_LOG = logging.getLogger("countdown")
# By type of device.
BACKENDS: dict[str, Backend] = {}


@dataclass(frozen=True)
class Chosen:
    """What computes a site's calls.

    Args:
        backend: None for the reference.
        reason: Why the reference does, None where it does not.
    """

    backend: Backend | None
    reason: str | None

    @property
    def name(self) -> str:
        """As `status` says it."""
        return REFERENCE if self.backend is None else self.backend.name

    def lay_out(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Sequence[Weight], Sequence[Weight]]:
        if self.backend is None:
            return sum_.weights, [in_rows(part) for part in parts]
        return self.backend.lay_out(sum_, parts)


def choose(
    sum_: Sum,
    selector: Selector | None,
    parts: Sequence[Weight],
    rule: str,
    *,
    compensation: str = "",
    laid_out: bool = True,
) -> Chosen:
    """Return what computes calls of this form where the weights are; see `Backend.refuses`."""
    reason = _refuses(sum_, selector, parts, rule, compensation, laid_out)
    return Chosen(BACKENDS[sum_.weights[0].device.type], None) if reason is None else Chosen(None, reason)


def missing(name: str) -> str | None:
    """Return why there is no backend of this name here, None if there is."""
    if requested() == REFERENCE:
        return f"{VARIABLE} is '{REFERENCE}'"
    return next(backend.missing() for backend in BACKENDS.values() if backend.name == name)


def _refuses(
    sum_: Sum, selector: Selector | None, parts: Sequence[Weight], rule: str, compensation: str, laid_out: bool
) -> str | None:
    device = sum_.weights[0].device.type
    if device not in BACKENDS:
        there = " and ".join(backend.runs_on for backend in BACKENDS.values())
        return f"there are kernels for {there}, and the weights are on {device}"
    backend, wanted = BACKENDS[device], requested()
    other = next((one for one in BACKENDS.values() if one.name == wanted), backend)
    if other is not backend:
        return f"it runs on {other.runs_on}, and the weights are on {device}"
    return missing(backend.name) or backend.refuses(
        sum_, selector, parts, rule, compensation=compensation, laid_out=laid_out
    )


def register(backend: Backend) -> Backend:
    """Make a backend compute the calls on its type of device.

    Raises:
        ConfigError: Another does.
    """
    there = BACKENDS.setdefault(backend.device, backend)
    if there is not backend:
        if type(there) is type(backend):
            return there
        raise ConfigError(f"{backend.device} has a backend already, {there.name}: there is one for a type of device.")
    KNOWN.append(backend.name)
    if backend.missing() is None:
        for op in SCHEMAS:
            LIBRARY.impl(op, adapted(backend, op), backend.key)
        for name, function in backend.step_ops().items():
            LIBRARY.impl(name, function, backend.key)
    return backend


def adapted(backend: Backend | None, op: str) -> Callable[..., Tensor]:
    """Return an op as a backend computes it, None for the reference: checks the call, asks, and falls back."""
    return partial(_compute, backend, op)


def _compute(backend: Backend | None, op: str, *args: Any, **kwargs: Any) -> Tensor:
    if backend is None:
        return reference.run(Call.of(op, *args, **kwargs))
    if (result := backend.again(op, args, kwargs)) is not None:
        return result
    call = Call.of(op, *args, **kwargs)
    wanted = requested()
    reason = backend.refuses(call.sum, call.selector, call.parts, call.rule, compensation=_compensation(call))
    if call.x.dtype not in backend.dtypes:
        reason = f"it has no kernel for {call.x.dtype}"
    if reason and wanted == backend.name and op == "sparse":
        raise ConfigError(f"{VARIABLE} is '{wanted}', which cannot compute this call: {reason}.")
    # Sets that are given beside phases are of prompts and generated tokens in one call, which is no decoding step; and
    # to select after two looks takes more than to select, for tests alone.
    if (op == "given" and call.phases is not None) or (op == "select" and call.looks > 1):
        return reference.run(call)
    if reason or wanted == REFERENCE or not 1 <= call.tokens <= MOST_TOKENS:
        return reference.run(call)
    return backend.run(call)


def is_for_reference(call: Call) -> bool:
    """Return whether the reference computes a call of few tokens, as no backend does."""
    chosen = choose(call.sum, call.selector, call.parts, call.rule, compensation=_compensation(call)).backend
    return chosen is None or call.x.dtype not in chosen.dtypes


def _compensation(call: Call) -> str:
    return "" if call.compensation is None else call.compensation.name


def _under_autocast(op: str, device: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute an op as autocast would a linear, from x in its dtype; weights and thresholds keep their own."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
    with without_autocast():
        result: Tensor = getattr(torch.ops.countdown, op)(x.to(dtype), *args, **kwargs)
    return result


def _fake(op: str) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: Call.of(op, *args, **kwargs).empty()


def _register_all() -> None:
    for op, schema in SCHEMAS.items():
        LIBRARY.define(op + schema)
        torch.library.register_fake(f"countdown::{op}", _fake(op), lib=LIBRARY)
        LIBRARY.impl(op, adapted(None, op), "CompositeExplicitAutograd")
        for device, key in DEVICES.items():
            LIBRARY.impl(op, partial(_under_autocast, op, device), key)
    for name, (schema, fake, function) in (dense.OPS | drawing.OPS | together.OPS).items():
        LIBRARY.define(name + schema)
        torch.library.register_fake(f"countdown::{name}", fake, lib=LIBRARY)  # type: ignore[arg-type]
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    for backend in (Triton(), CPU()):
        register(backend)
    for entry in entry_points(group="countdown.backends"):
        try:
            register(entry.load()())
        except Exception as error:  # one broken package must not take the others down
            _LOG.warning(
                "backend '%s' of an installed package is left out: %s: %s", entry.name, type(error).__name__, error
            )


_register_all()
