"""The module that runs in place of a model's site, and the one that stands in during calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from countdown.artifacts import Artifacts
from countdown.autocast import without_autocast
from countdown.errors import ConfigError, ProfileError, UnsupportedModelError
from countdown.methods import Method
from countdown.ops import backends
from countdown.ops.backends import Chosen
from countdown.ops.reference import drop_smallest
from countdown.phase import GENERATED, PADDING, PROMPT, Phases
from countdown.selectors import Selector
from countdown.selectors.prompt import scores
from countdown.sequences import Sequences
from countdown.sites import Site
from countdown.sites.decoder import decoder_of
from countdown.sites.holders import holder_of
from countdown.sums import Sum
from countdown.sums._base import product_of
from countdown.weights import Weight
from countdown.wrappers import base_model, check_model

APPLY_TO = ("decode", "all")


class SparseModule(nn.Module):
    """A module that sums, for each token, only the active terms of the site it replaces.

    A token's active set depends on its own values and its phase alone. It shares the dictionaries of children and
    parameters with the module it replaces, so names, parameters and `state_dict` stay as they are, and whatever
    replaces a child or moves, casts or assigns a parameter, here or there, is seen by both.

    Args:
        site: What to replace; its module is kept and gives the dense path.
        method: What decides, with its settings for this site.
        per_term: float32 `[terms]`: the thresholds τ_i of a threshold decision, the multipliers m_i of topk; of two
            looks, `[2, terms]`.
        phases: Of the tokens of the model's present call.
        apply_to: `decode` (the prompt is dense) or `all`.
        artifacts: What calibration left for the site.
        parts: Those of the selector, where they are made already.
        added: Those of the compensation, likewise.

    Raises:
        ConfigError: The method does not apply to all tokens.
        ProfileError: What keeps parts needs an artifact that is not there.
    """

    per_term: Tensor
    counters: Tensor

    def __init__(
        self,
        site: Site,
        method: Method,
        per_term: Tensor,
        *,
        phases: Phases,
        apply_to: str,
        artifacts: Artifacts | None = None,
        parts: Sequence[Weight] | None = None,
        added: Sequence[Weight] | None = None,
    ) -> None:
        check_applies(method, apply_to)
        super().__init__()
        self.site, self.method, self.phases, self.apply_to = site, method, phases, apply_to
        self.kind, self.terms, self.size = site.kind, site.terms, site.size
        self._options: dict[str, Any] = {
            "kind": site.kind, "activation": site.sum.activation, "compensation": self.compensation
        }  # fmt: skip
        if not self.selector.from_prompt:
            self._options |= {
                "selector": self.selector.name, "rule": method.decision, "drop": method.drop(self.terms)
            }  # fmt: skip
        given = artifacts or {}
        for keeper in method.keepers.values():
            if missing := [one.name for one in keeper.artifacts if one.name not in given]:
                raise ProfileError(f"the profile has no {missing[0]} of the inputs of {site.name}; calibrate again.")
        self._artifacts = {one.name: given[one.name] for keeper in method.keepers.values() for one in keeper.artifacts}
        self._linears = site.linears  # in a tuple, so that they are not registered
        self.forced_dense = False
        self._modules, self._parameters = site.module._modules, site.module._parameters
        # Made under inference_mode, the counters could not be counted up outside of it.
        with torch.inference_mode(False):
            self.register_buffer("per_term", per_term.to(site.device).clone(), persistent=False)
            counters = torch.zeros(1 + len(method.drops), dtype=torch.int64, device=site.device)
            self.register_buffer("counters", counters, persistent=False)
        self.parts = tuple(part.to(site.device) for part in parts or ())
        self.added = tuple(part.to(site.device) for part in added or ())
        self.make_parts(selector=parts is None, compensation=added is None)
        # What is not derived follows no weights, so that it is made once.
        for keeper in method.keepers.values():
            for one in () if keeper.derived else keeper.artifacts:
                del self._artifacts[one.name]
        # Weights that are loaded come in the layout of a checkpoint, and other parts follow from them.
        self.register_load_state_dict_post_hook(_follow_weights)
        self.eval()

    @property
    def selector(self) -> Selector:
        """What decides."""
        return self.method.selector

    @property
    def compensation(self) -> str:
        """The name of what is added for inactive terms, "" for nothing."""
        found = self.method.compensation
        return "" if found is None else found.name

    @property
    def dense(self) -> nn.Module:
        """The module this one replaces. It shares every parameter with it."""
        return self.site.module

    @property
    def refusal(self) -> str | None:
        """Why the reference computes this module, None if the backend of its device does."""
        return self._chosen().reason

    @property
    def planned_refusal(self) -> str | None:
        """Why the reference would compute this module once its weights are laid out, None if a backend would."""
        return self._chosen(laid_out=False).reason

    @property
    def backend(self) -> str:
        """What computes this module's sparse tokens."""
        return self._chosen().name

    def _chosen(self, *, laid_out: bool = True) -> Chosen:
        return backends.choose(
            self.site.sum,
            None if self.selector.from_prompt else self.selector,
            self.parts,
            self.method.decision,
            compensation=self.compensation,
            laid_out=laid_out,
        )

    def release(self) -> nn.Module:
        """Return the dense module as it was given, its weights laid out as linears have them."""
        # Adapters may have come around them since.
        weights = [holder_of("", linear).read(linear)[0].in_rows() for linear in self._linears]
        self.site.store(self._linears, weights)
        return self.dense

    def forward(self, x: Tensor) -> Tensor:
        """Return what the dense module would, of generated tokens the sum over their active terms.

        Raises:
            UnsupportedModelError: In training mode, when gradients are recorded, or when an adapter was put on a
                linear that would be bypassed. Where the prompt chooses: when that was not seen, or is not known.
        """
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise UnsupportedModelError(
                "a sparsified model is for inference: call model.eval() and run it under torch.no_grad() or "
                "torch.inference_mode(), or undo it with countdown.restore_(model)."
            )
        now = self.phases.now
        chooses = self.selector.from_prompt and self.phases.sequences is not None
        if self.forced_dense or (self.apply_to == "decode" and (now is None or (now is PROMPT and not chooses))):
            y: Tensor = self.dense(x)
            return y
        if now is GENERATED:
            return self.sparse(x)
        if now is PADDING and self.selector.from_prompt:
            return self.site.sum.combine(x.new_zeros(*x.shape[:-1], self.terms))
        return self._by_prompt(x) if chooses else self.sparse(x, self._phases_of(x))

    def _by_prompt(self, x: Tensor) -> Tensor:
        """Return the dense sum of prompts' tokens, which renew the sets, and that over the sets of others."""
        now, whose = self.phases.now, self.phases.sequences
        assert whose is not None
        sum_ = self.site.sum
        coefficients = product_of(sum_.project(x))
        if whose.refusal is None:
            self._choose(whose, coefficients)
        return self.sparse(x, now) if isinstance(now, Tensor) else sum_.combine(coefficients)

    def _choose(self, whose: Sequences, coefficients: Tensor) -> None:
        """Add the prompt tokens of a call to the scores of their sequences, and renew the sets."""
        now = self.phases.now
        with torch.no_grad():
            each = coefficients.reshape(whose.count, -1, self.terms)
            counted = None if whose.padding is None else ~whose.padding
            if isinstance(now, Tensor):
                prompt = (now == PROMPT).view(each.shape[:-1])
                counted = prompt if counted is None else prompt & counted
            whose.choose(self.site.name, scores(each, counted), partial(chosen, drop=self.method.drop(self.terms)))

    def _sets(self, x: Tensor) -> Tensor:
        """Return the set of each token's sequence, bool `[..., terms]`."""
        whose = self.phases.sequences
        found = None if whose is None else whose.active(self.site.name, x.device)
        if whose is None or found is None:
            raise UnsupportedModelError(
                f"{self.method.name} without a prompt: it chooses a set from the prompt, which this model has not seen "
                "whole, as a call of two tokens or more that begins with an empty cache."
            )
        tokens = x.shape[:-1].numel() // whose.count
        return found[:, None].expand(-1, tokens, -1).reshape(*x.shape[:-1], self.terms)

    def _phases_of(self, x: Tensor) -> Tensor | None:
        """Return the phase of each token, None where all are to be sparse."""
        now = self.phases.now
        if isinstance(now, Tensor):
            # Sparse on all tokens, a prompt is as what is generated.
            return torch.where(now == PROMPT, GENERATED, now) if self.apply_to == "all" else now
        if now is PADDING:
            return torch.full((x.shape[:-1].numel(),), PADDING, dtype=torch.uint8, device=x.device)
        return None

    def sparse(self, x: Tensor, phases: Tensor | None = None) -> Tensor:
        """Return the sum over the active terms of each token, `[..., outputs]` for x `[..., d]`.

        Args:
            x: The input.
            phases: uint8, one for each token, or None where all are generated; see `countdown.phase`.
        """
        arguments, options = self.arguments()
        # Not by `__getattr__`, twice at every call.
        per_term, counters = self._buffers["per_term"], self._buffers["counters"]
        if self.selector.from_prompt:
            sets = self._sets(x)
            return torch.ops.countdown.given(x, *arguments, sets, counters, phases, **options)  # type: ignore[no-any-return]
        return torch.ops.countdown.sparse(x, *arguments, per_term, counters, phases, **options)  # type: ignore[no-any-return]

    def active(self, x: Tensor) -> Tensor:
        """Return the active set of each token, bool `[..., terms]`, for x `[..., d]`, all of them generated."""
        if self.selector.from_prompt:
            return self._sets(x)
        arguments, options = self.arguments()
        return torch.ops.countdown.select(x, *arguments, self.per_term, None, **options)  # type: ignore[no-any-return]

    def arguments(self) -> tuple[tuple[list[Tensor], list[Tensor | None]], dict[str, Any]]:
        """Return weights and biases, and the options of a call; see `ops.call`."""
        # Not by the site's sum, which is made again of these: at every call of every FFN.
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        formats: list[str] = []
        for rows in self.site.rows():
            weight, bias = rows.of(self.site.module)
            weights += weight.parts
            biases.append(bias)
            formats.append(weight.format)
        for part in (*self.parts, *self.added):
            weights += part.parts
            formats.append(part.format)
        return (weights, biases), {"formats": formats, **self._options}

    @property
    def part_bytes(self) -> int:
        """Bytes of the parts beside the weights, those that fill a last tile or lie between rows included."""
        between = (tensor.untyped_storage().nbytes() for part in self.added for tensor in part.parts)
        return sum(part.nbytes for part in self.parts) + sum(between)

    def make_parts(self, *, selector: bool = True, compensation: bool = True) -> None:
        """Make the parts of the selector and of the compensation from the weights as they are now."""
        with torch.inference_mode(False), torch.no_grad(), without_autocast():
            if selector:
                self.parts = self.selector.make(self.site.sum, self._artifacts)
            making = self.method.compensation
            if compensation and making is not None and (making.derived or not self.added):
                self.added = making.make(self.site.sum, self._artifacts)

    def lay_out(self) -> None:
        """Store the weights, and the selector's parts, as the backend that will compute wants them.

        What is unpickled on another device is not: call `model.to(device)`, which does.
        """
        with torch.inference_mode(False), without_autocast():
            parts = [part.to(self.per_term.device) for part in self.parts]
            sum_ = self.site.sum
            if making := self.method.compensation:
                self.added = making.fitted(sum_, self.added)
            weights, laid_out = self._chosen(laid_out=False).lay_out(sum_, [*parts, *self.added])
            self.site.store(self.site.linears, weights)
            self.parts, self.added = tuple(laid_out[: len(parts)]), tuple(laid_out[len(parts) :])

    def extra_repr(self) -> str:
        """Name what decides, for `print(model)`."""
        return f"{self.method}, apply_to={self.apply_to}"

    def __getattr__(self, name: str) -> Any:
        # Models look at more of a linear than its forward: at its sizes, say.
        try:
            return super().__getattr__(name)
        except AttributeError:
            site = self.__dict__.get("site")
            if site is None or name.startswith("_"):
                raise
            return getattr(site.module, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModule:
        # model.half() and the like cast float buffers; thresholds keep their bits and only change device.
        exact = self.per_term
        super()._apply(fn, recurse)
        self.per_term = exact.to(self.per_term.device)
        self._free_buffers()
        self.lay_out()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled module."""
        super().__setstate__(state)
        self._free_buffers()

    def _free_buffers(self) -> None:
        # Made under inference_mode, they could not be written to outside of it, as counting does and the decode loop.
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_inference():
                with torch.inference_mode(False):
                    self._buffers[name] = buffer.clone()


def _follow_weights(module: nn.Module, _: object) -> None:
    assert isinstance(module, SparseModule)
    module.make_parts()
    module.lay_out()


# Called with a site, its sum, its input, and the factors of its terms, each [..., terms]; returns the active set, None
# for all.
Observer = Callable[[Site, Sum, Tensor, tuple[Tensor, ...]], Tensor | None]


# Called with a site, its input and which terms are dropped, bool [..., terms]; returns what is added for these.
Adder = Callable[[Site, Tensor, Tensor], Tensor | None]


class ObservedSite(nn.Module):
    """A site that shows its factors as it computes; stands in during calibration.

    Args:
        site: What to stand in for.
        observe: Called at every forward.
        add: Called where terms are dropped.
    """

    def __init__(self, site: Site, observe: Observer, add: Adder) -> None:
        super().__init__()
        self._site = site
        self._observe, self._add = observe, add
        # The model's parameters are there meanwhile, under their names.
        self._modules, self._parameters = site.module._modules, site.module._parameters

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum over the active terms that the observer names."""
        sum_ = self._site.sum
        factors = sum_.project(x)
        active = self._observe(self._site, sum_, x, factors)
        coefficients = product_of(factors)
        if active is None:
            return sum_.combine(coefficients)
        y = sum_.combine(torch.where(active, coefficients, 0))
        added = self._add(self._site, x, ~active)
        return y if added is None else y + added

    def __getattr__(self, name: str) -> Any:
        # Models look at more of a linear than its forward: at the dtype of its weight, say.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._site.module, name)


@contextmanager
def observed(
    model: nn.Module, sites: Sequence[Site], observe: Observer, add: Adder = lambda *_: None
) -> Iterator[None]:
    """Within the context, call `observe` at every forward of every site, and `add` where it drops terms."""
    try:
        for site in sites:
            model.set_submodule(site.name, ObservedSite(site, observe, add))
        yield
    finally:
        for site in sites:
            model.set_submodule(site.name, site.module)


def check_dense(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless `model` is a causal language model, dense, whole and in eval mode."""
    if sparse_modules(model):
        raise UnsupportedModelError("the model is sparsified already; undo it with countdown.restore_(model).")
    if "_orig_mod" in model._modules:
        raise UnsupportedModelError(
            "the model is compiled; give the model itself (model._orig_mod), and compile after sparsify_."
        )
    decoder_of(base_model(model))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            "weights of the model are not in memory: they are offloaded, or were never loaded. Load it whole, on one "
            "device."
        )
    if model.training:
        raise UnsupportedModelError("the model is in training mode; call model.eval() first.")


def sparse_modules(model: nn.Module) -> dict[str, SparseModule]:
    """Return the sparse modules of `model` by name; empty for a model that is not sparsified.

    Raises:
        UnsupportedModelError: It is no model at all.
    """
    check_model(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}


def check_applies(method: Method, apply_to: str) -> None:
    """Raise ConfigError if a method chooses from prompts and is to apply to these."""
    if apply_to == "all" and method.selector.from_prompt:
        raise ConfigError(
            f"{method.name} does not fit apply_to='all': it chooses a set from the prompt, which would have seen the "
            "tokens that it is applied to. Take 'decode'; to evaluate, say how many tokens are prompt (prompt_tokens)."
        )


def chosen(scored: Tensor, *, drop: int) -> Tensor:
    """Return the sets, bool `[sequences, terms]`, of summed scores: all but the smallest, all where nothing scored."""
    return drop_smallest(scored, drop) | (scored.sum(dim=-1, keepdim=True) == 0)


@contextmanager
def running(model: nn.Module, mode: str) -> Iterator[None]:
    """Within the context, run a sparsified model as `dense`, or sparse on `decode` or `all` tokens.

    Raises:
        ConfigError: A method does not apply to all tokens.
    """
    modules = sparse_modules(model).values()
    for module in modules:
        check_applies(module.method, mode)
    before: list[tuple[Any, ...]] = [(module.apply_to, module.forced_dense) for module in modules]
    try:
        for module in modules:
            module.forced_dense = mode == "dense"
            module.apply_to = module.apply_to if mode == "dense" else mode
        yield
    finally:
        for module, (apply_to, forced_dense) in zip(modules, before, strict=True):
            module.apply_to, module.forced_dense = apply_to, forced_dense
