"""Tells whether a module is a gated FFN, by its forward on random input, and if not, why."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from countdown.sites._base import Site
from countdown.sites.gated import GatedFFN
from countdown.sites.holders import Rows, can_compute, holder_of, is_linear, linear_sizes
from countdown.sums._base import product_of
from countdown.sums.activations import ACTIVATIONS

# Clamps and soft caps are invisible at small inputs.
VERIFY_SCALES = (1.0, 30.0, 1000.0)
VERIFY_TOKENS = 4
# In float32, where a right formula differs by the order of summation and a wrong one by far more.
TOLERANCE = 1e-5


def shaped_like_ffn(module: nn.Module) -> bool:
    """Return whether the linears among a module's children have the shapes of a gated FFN."""
    return next(_roles(module), None) is not None


def ungated(layer: nn.Module) -> tuple[str, str] | None:
    """Return the names of two linears that form an FFN without a gate, the largest there is, or None.

    They are the only linears of their module, or each the only one of its own.
    """
    groups: list[list[tuple[str, tuple[int, int]]]] = [[]]
    for path, module in layer.named_modules():
        linears = [
            (f"{path}.{name}" if path else name, size)
            for name, child in module.named_children()
            if (size := linear_sizes(child)) is not None
        ]
        if len(linears) == 1:
            groups[0].extend(linears)
        if len(linears) == 2:
            groups.append(linears)
    pairs = [
        (size, one, other)
        for group in groups
        for (one, size), (other, back) in itertools.combinations(group, 2)
        if size == back[::-1] and size[0] != size[1]
    ]
    return max(pairs, key=lambda pair: math.prod(pair[0]))[1:] if pairs else None


def _plain(module: nn.Module) -> bool:
    """Return whether every linear inside is one that can be computed in its place."""
    return all(can_compute(child) for child in module.children() if is_linear(child))


@torch.no_grad()
def acts_on_tokens(module: nn.Module) -> bool:
    """Return whether a module takes hidden states alone and treats each token by itself.

    An FFN does. Attention, which may have the linears of a gated FFN by coincidence, does not.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if sum(p.default is p.empty for p in named) > 1:
        return False
    if not _plain(module):
        # Not copied or called: it may be quantised.
        return True
    module = _in_float32(module)
    x = next(_inputs(GatedFFN("", module, *next(_roles(module)), "linear")))
    own, again, last = _own(module, x), _own(module, x), _own(module, x[:, -1:])
    if own is None or again is None or last is None or own.shape != x.shape:
        return False
    return not torch.equal(own, again) or _distance(last, own[:, -1:]) <= TOLERANCE


def recognise(name: str, module: nn.Module, hint: list[GatedFFN]) -> GatedFFN | None:
    """Return the gated FFN that `module` is, or None.

    Args:
        name: The module's dotted name.
        module: With linears of fitting shapes.
        hint: The previous layer's, if any: nearly always this layer has its form, and less is tried.
    """
    if not _plain(module):
        return None
    for known in hint:
        likely = replace(known, name=name, module=module)
        if _same_form(likely, known) and _confirmed(likely, known):
            return likely
    error, best = min(_guesses(name, _in_float32(module)), key=lambda pair: pair[0])
    return replace(best, module=module) if error <= TOLERANCE else None


def why_not(name: str, module: nn.Module) -> str:
    """Return, as a sentence, why a module with the linears of a gated FFN, that acts on tokens, is not one.

    Raises:
        UnsupportedModelError: One of its linears is not a plain `nn.Linear`.
    """
    what = f"{name} ({type(module).__name__})"
    for child, inside in module.named_children():
        if is_linear(inside):
            holder_of(f"{name}.{child}", inside)
    extra = [
        f"{child} ({type(inside).__name__})"
        for child, inside in module.named_children()
        if not is_linear(inside) and next(inside.parameters(), None) is not None
    ]
    if extra:
        return f"{what} has parameters beside its linears and does more than a gated FFN: {', '.join(extra)}."
    if next(module.parameters(recurse=False), None) is not None:
        return f"{what} has parameters of its own beside its linears."
    return f"{what} {_difference(_in_float32(module))}"


def _roles(module: nn.Module) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Yield every assignment of gate, up and down to the linears among a module's children that fits by shape."""
    sizes = {name: linear_sizes(child) for name, child in module.named_children() if is_linear(child)}
    linears = {name: size for name, size in sizes.items() if size is not None}
    if len(linears) == 3:
        for gate, up, down in itertools.permutations(linears):
            if linears[gate] == linears[up] == linears[down][::-1]:
                yield Rows(gate), Rows(up), Rows(down)
    if len(linears) == 2:
        for fused, down in itertools.permutations(linears):
            d, twice = linears[fused]
            if linears[down] == (twice / 2, d):
                for one, other in _halves(fused, twice):
                    yield one, other, Rows(down)
                    yield other, one, Rows(down)


def _halves(fused: str, rows: int) -> Iterator[tuple[Rows, Rows]]:
    h = rows // 2
    yield Rows(fused, 0, h), Rows(fused, h, rows)
    yield Rows(fused, 0, None, 2), Rows(fused, 1, None, 2)


def _same_form(one: GatedFFN, other: GatedFFN) -> bool:
    if type(one.module) is not type(other.module):
        return False
    names = [[name for name, _ in ffn.module.named_children()] for ffn in (one, other)]
    return names[0] == names[1] and one.shape == other.shape


def _confirmed(likely: GatedFFN, known: GatedFFN) -> bool:
    meta = likely.sum.weights[0].device.type == "meta"
    # Random weights in place of meta ones proved the form once; what else could differ are settings.
    if meta and _settings(likely.module) == _settings(known.module):
        return True
    if not meta and error_of(likely) == 0:
        return True
    return error_of(replace(likely, module=_in_float32(likely.module))) <= TOLERANCE


def _settings(module: nn.Module) -> list[object]:
    """Return the class and the plain attributes of a module and all below it; tensors by identity."""
    found: list[object] = []
    for part in module.modules():
        attributes = {name: value for name, value in vars(part).items() if not name.startswith("_")}
        found += [type(part), {n: id(v) if isinstance(v, Tensor) else v for n, v in attributes.items()}]
    return found


@torch.no_grad()
def error_of(site: Site) -> float:
    """Return how far a site's sum is from its module's own forward, ‖own − sum‖ / ‖own‖, on random inputs.

    The worst over `VERIFY_SCALES`; above `TOLERANCE` in float32 it is another function.
    """
    return max(
        _distance(_own(site.module, x), site.sum.combine(product_of(site.sum.project(x)))) for x in _inputs(site)
    )


@torch.no_grad()
def _guesses(name: str, module: nn.Module) -> Iterator[tuple[float, GatedFFN]]:
    """Yield every assignment of roles and activation with its error; those far off at the first scale, with that."""
    cases: list[tuple[Tensor, Tensor | None]] = []
    for roles in _roles(module):
        raw = GatedFFN(name, module, *roles, "linear")
        cases = cases or [(x, _own(module, x)) for x in _inputs(raw)]
        projected = [raw.sum.project(x) for x, _ in cases]
        for activation, act in ACTIVATIONS.items():
            worst = 0.0
            for (g, u), (_, own) in zip(projected, cases, strict=True):
                worst = max(worst, _distance(own, raw.sum.combine(act(g) * u)))
                if worst > TOLERANCE:
                    break
            yield worst, replace(raw, activation=activation)


def _inputs(site: Site) -> Iterator[Tensor]:
    generator, size, like = torch.Generator().manual_seed(0), site.axes(site.shape)["inputs"], site.weights[0].values()
    for scale in VERIFY_SCALES:
        yield (
            torch.randn(1, VERIFY_TOKENS, size, generator=generator, dtype=torch.float32, device="cpu").to(like) * scale
        )


def _own(module: nn.Module, x: Tensor) -> Tensor | None:
    try:
        own = module(x)
    except Exception:  # whatever a module raises that is no FFN and was not made for one tensor
        return None
    return own if isinstance(own, Tensor) else None


def _distance(own: Tensor | None, formula: Tensor) -> float:
    if own is None or own.shape != formula.shape or not torch.equal(own.isfinite(), formula.isfinite()):
        return float("inf")
    # Where float16 overflows, both do; the finite rest is compared.
    one, other = (value.nan_to_num(0, 0, 0).double() for value in (own, formula))
    norm, difference = one.norm().item(), (one - other).norm().item()
    return float(difference / norm if norm else difference)


def _in_float32(module: nn.Module) -> nn.Module:
    """Return the module in float32: itself if it is, else a copy; random where its weights are on the meta device."""
    first = next(itertools.chain(module.parameters(), module.buffers()))
    if first.is_meta:
        return _randomised(module)
    return module if first.dtype == torch.float32 else copy.deepcopy(module).float()


@torch.no_grad()
def _randomised(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() else 1
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") / fan_in**0.5
        )
    return module


@torch.no_grad()
def _difference(module: nn.Module) -> str:
    """Return what a float32 module does that the formula does not."""
    guesses = [guess for _, guess in _guesses("", module)]
    small = next(_inputs(guesses[0]))
    own, again = module(small), module(small)
    if not torch.equal(own, again):
        return "gives another result each time in eval mode, as dropout does."
    formulas = [(guess, guess.sum.combine(product_of(guess.sum.project(small)))) for guess in guesses]
    if any(_distance(own, formula) <= TOLERANCE for _, formula in formulas):
        return "follows the formula on small inputs only: it clamps or caps values."
    for guess, formula in formulas:
        factor = (own.flatten() @ formula.flatten() / formula.square().sum()).item()
        if _distance(own, formula * factor) <= TOLERANCE:
            return f"multiplies its result by {factor:.4g} ({guess.activation})."
    names = ", ".join(ACTIVATIONS)
    return f"does not compute down(act(gate(x)) * up(x)) with act one of {names}."
