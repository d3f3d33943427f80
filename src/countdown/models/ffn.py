"""Finds the gated FFNs of a decoder by structure, and proves each against its own forward."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from countdown.errors import UnsupportedModelError
from countdown.ops.activations import ACTIVATIONS

# Clamps and soft caps are invisible at small inputs.
VERIFY_SCALES = (1.0, 30.0, 1000.0)
VERIFY_TOKENS = 4


@dataclass(frozen=True)
class GatedFFN:
    """One gated FFN, y = W_down (act(W_gate x) ⊙ W_up x), and where it sits.

    Args:
        name: The module's dotted name in the model.
        module: The module itself.
        gate_name, up_name, down_name: The names of its three `nn.Linear` children, by role.
        activation: A key of `ops.activations.ACTIVATIONS`.
    """

    name: str
    module: nn.Module
    gate_name: str
    up_name: str
    down_name: str
    activation: str

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The gate, up and down projections."""
        names = (self.gate_name, self.up_name, self.down_name)
        gate, up, down = (self.module.get_submodule(name) for name in names)
        assert isinstance(gate, nn.Linear)
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        return gate, up, down

    @property
    def d(self) -> int:
        """Hidden size."""
        return self.linears[0].in_features

    @property
    def h(self) -> int:
        """Intermediate size: the number of neurons."""
        return self.linears[0].out_features

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a = act(W_gate x) and u = W_up x, each `[..., h]`, for x `[..., d]`."""
        gate, up, _ = self.linears
        return ACTIVATIONS[self.activation](gate(x)), up(x)

    def combine(self, s: Tensor) -> Tensor:
        """Return W_down s `[..., d]` for coefficients s `[..., h]`."""
        y: Tensor = self.linears[2](s)
        return y

    def column_norms(self) -> Tensor:
        """Return ‖w_i‖₂ for each column w_i of W_down, float64 `[h]`."""
        norms: Tensor = self.linears[2].weight.detach().double().norm(dim=0)
        return norms


def find_ffns(model: nn.Module) -> list[GatedFFN]:
    """Return the gated FFN of every decoder layer, in order.

    A gated FFN is a module with three linears of the right shapes whose forward equals the formula on random
    input at several scales, for one assignment of roles and one known activation. Names play no part. On the
    meta device a randomly initialised copy stands in for the weights.

    Raises:
        UnsupportedModelError: A layer has no such FFN or has experts, or a linear is not a plain `nn.Linear`
            without hooks.
    """
    decoder, prefix = _decoder(model)
    _refuse_experts(model, decoder)
    layers_name, layers = _layers(model, decoder)
    found: list[GatedFFN] = []
    for index, layer in enumerate(layers):
        path = f"{prefix}{layers_name}.{index}"
        candidates = [(name, module) for name, module in layer.named_modules() if _shaped_like_ffn(module)]
        if len(candidates) != 1:
            raise _not_recognised(model, layer, path, len(candidates))
        name, module = candidates[0]
        found.append(_recognise(model, f"{path}.{name}" if name else path, module, found[-1:]))
    return found


def check_untouched(ffn: GatedFFN) -> None:
    """Raise UnsupportedModelError if something would be bypassed when `ffn` is replaced."""
    parts = {ffn.name: ffn.module} | {
        f"{ffn.name}.{child}": linear
        for child, linear in zip((ffn.gate_name, ffn.up_name, ffn.down_name), ffn.linears, strict=True)
    }
    for name, module in parts.items():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) has hooks or a replaced forward, which a sparse FFN would "
                "bypass; remove them first (offloading by accelerate sets them: load without device_map)."
            )


def _decoder(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the text decoder and its dotted prefix, so that vision and audio towers are left out."""
    get_decoder = getattr(model, "get_decoder", None)
    if not callable(get_decoder):
        raise UnsupportedModelError(f"{type(model).__name__} is not a causal language model of transformers.")
    decoder: nn.Module = get_decoder()
    for name, module in model.named_modules():
        if module is decoder:
            return decoder, f"{name}." if name else ""
    raise UnsupportedModelError(f"{type(model).__name__} does not contain the decoder it names.")


def _refuse_experts(model: nn.Module, decoder: nn.Module) -> None:
    for name, module in decoder.named_modules():
        if "experts" in dict(module.named_children()):
            raise UnsupportedModelError(
                f"{type(model).__name__} has a mixture of experts ({name}, {type(module).__name__}); "
                "countdown supports models whose every layer has one gated FFN."
            )


def _layers(model: nn.Module, decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            return name, child
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported: its decoder {type(decoder).__name__} has no list of layers."
    )


def _linear_like(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: child
        for name, child in module.named_children()
        if hasattr(child, "in_features") and hasattr(child, "out_features")
    }


def _shaped_like_ffn(module: nn.Module) -> bool:
    linears = list(_linear_like(module).values())
    return len(linears) == 3 and any(_shapes_fit(*order) for order in itertools.permutations(linears))


def _shapes_fit(gate: nn.Module, up: nn.Module, down: nn.Module) -> bool:
    d, h = gate.in_features, gate.out_features
    return (up.in_features, up.out_features) == (d, h) and (down.in_features, down.out_features) == (h, d)


def _not_recognised(model: nn.Module, layer: nn.Module, path: str, count: int) -> UnsupportedModelError:
    parts = ", ".join(f"{name}: {type(child).__name__}" for name, child in layer.named_children())
    what = "no gated FFN that countdown recognises" if count == 0 else f"{count} gated FFNs instead of one"
    return UnsupportedModelError(
        f"{type(model).__name__} is not supported: layer {path} ({type(layer).__name__}) has {what}. "
        f"Its parts are {parts}."
    )


def _recognise(model: nn.Module, name: str, module: nn.Module, hint: list[GatedFFN]) -> GatedFFN:
    linears = _linear_like(module)
    for child, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise UnsupportedModelError(
                f"{name}.{child} is a {type(linear).__module__}.{type(linear).__name__}, expected a plain "
                "torch.nn.Linear: adapters and quantised modules on the FFN would be bypassed."
            )
    if next(module.parameters(recurse=False), None) is None:
        best = min(_hypotheses(name, module, list(linears), hint), key=lambda pair: pair[0])
        if best[0] <= _tolerance(best[1]):
            return best[1]
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported: {name} ({type(module).__name__}) does not compute "
        f"down(act(gate(x)) * up(x)) with act one of {', '.join(ACTIVATIONS)}."
    )


def _hypotheses(
    name: str, module: nn.Module, children: list[str], hint: list[GatedFFN]
) -> Iterator[tuple[float, GatedFFN]]:
    """Yield assignments of roles and activation with their error, until one is exact.

    The previous layer's comes first: nearly always it is this layer's too.
    """
    guesses = [
        GatedFFN(name, module, gate, up, down, activation)
        for gate, up, down in itertools.permutations(children)
        if _shapes_fit(*map(module.get_submodule, (gate, up, down)))
        for activation in ACTIVATIONS
    ]
    for known in hint:
        guesses.sort(key=lambda guess: not _same_form(guess, known))
        if guesses[0].linears[0].weight.is_meta and _same_form(guesses[0], known):
            # Random weights in place of meta ones prove the form once; they cannot differ by layer.
            yield 0.0, guesses[0]
            return
    for guess in guesses:
        error = _relative_error(guess)
        yield error, guess
        if error == 0:
            return


def _same_form(one: GatedFFN, other: GatedFFN) -> bool:
    return type(one.module) is type(other.module) and (
        (one.gate_name, one.up_name, one.down_name, one.activation, one.d, one.h)
        == (other.gate_name, other.up_name, other.down_name, other.activation, other.d, other.h)
    )


@torch.no_grad()
def _relative_error(ffn: GatedFFN) -> float:
    """Return ‖own forward − formula‖ / ‖own forward‖, the worst over `VERIFY_SCALES`."""
    if ffn.linears[0].weight.is_meta:
        ffn = _materialised(ffn)
    weight = ffn.linears[0].weight
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for scale in VERIFY_SCALES:
        x = torch.randn(1, VERIFY_TOKENS, ffn.d, generator=generator).to(weight) * scale
        own = ffn.module(x)
        a, u = ffn.project(x)
        formula = ffn.combine(a * u)
        same_shape = isinstance(own, Tensor) and own.shape == formula.shape
        if not same_shape or not torch.equal(own.isfinite(), formula.isfinite()):
            return float("inf")
        # Where float16 overflows, both do; the finite rest is compared.
        finite = [value.nan_to_num(0, 0, 0).double() for value in (own, formula)]
        norm = finite[0].norm().item()
        difference = (finite[0] - finite[1]).norm().item()
        worst = max(worst, difference / norm if norm else difference)
    return worst


def _tolerance(ffn: GatedFFN) -> float:
    # A right formula mostly gives the same bits; another order of summation, less than one rounding.
    return max(1e-5, torch.finfo(ffn.linears[0].weight.dtype).eps)


def _materialised(ffn: GatedFFN) -> GatedFFN:
    module = copy.deepcopy(ffn.module).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return replace(ffn, module=module)
