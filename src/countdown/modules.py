"""The modules that run in place of a model's sites."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from countdown.errors import ProfileError, UnsupportedModelError
from countdown.methods import Method
from countdown.models.sites import GatedFFN, LinearInput, Site, check_plain
from countdown.ops import backends
from countdown.ops.proxy_tiles import in_rows, in_tiles

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLY_TO = ("decode", "all")
SiteT = TypeVar("SiteT", bound=Site)


class SparseSite(nn.Module):
    """A module that sums, for each token, only the active terms of the site it replaces.

    A token's active set depends on its own values and its phase alone: a call with one new token for each sequence
    is generation, one with more is prompt.

    Args:
        site: What to replace; its module is kept and gives the dense path.
        method: What decides, with its settings for this site.
        per_term: float32 `[terms]`: the thresholds τ_i of a threshold decision, the weights m_i of topk.
        apply_to: `decode` (the prompt is dense) or `all`.
    """

    kind: ClassVar[str]
    per_term: Tensor
    counters: Tensor

    def __init__(self, site: Site, method: Method, per_term: Tensor, *, apply_to: str) -> None:
        super().__init__()
        # In a tuple, so that its parameters are not registered twice.
        self._dense = (site.module,)
        self.terms, self.size = site.terms, site.size
        self.method = method
        self._decision = {
            "decision": method.decision,
            "drop": method.drop(self.terms),
            "indicator": method.indicator.name,
        }
        self.apply_to = apply_to
        self.forced_dense = False
        # Made under inference_mode, the counters could not be counted up outside of it.
        with torch.inference_mode(False):
            self.register_buffer("per_term", per_term.to(site.device).clone(), persistent=False)
            counters = torch.zeros(2, dtype=torch.int64, device=site.device)
            self.register_buffer("counters", counters, persistent=False)
        # Weights that are loaded come in the layout of a checkpoint, and another proxy follows from them.
        self.register_load_state_dict_post_hook(_follow_weights)
        self.eval()

    @property
    def dense(self) -> nn.Module:
        """The module this one replaces. It shares every parameter with it."""
        return self._dense[0]

    def check_parts(self) -> None:
        """Raise UnsupportedModelError if a module inside was replaced by one that would be bypassed."""

    @property
    @abstractmethod
    def refusal(self) -> str | None:
        """Why the reference computes this module, None if the backend of its device does."""

    @property
    def planned_refusal(self) -> str | None:
        """Why the reference would compute this module once its weights are laid out, None if a backend would."""
        return self.refusal

    @property
    def backend(self) -> str:
        """What computes this module's sparse tokens."""
        return backends.BY_DEVICE[self.per_term.device.type] if self.refusal is None else "reference"

    def release(self) -> nn.Module:
        """Return the dense module as it was given."""
        return self.dense

    @abstractmethod
    def sparse(self, x: Tensor) -> Tensor:
        """Return the sum over the active terms of each token."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the dense module would, the second last dimension of x counting a sequence's new tokens.

        Raises:
            UnsupportedModelError: In training mode, when gradients are recorded, or when an adapter was put on a
                linear that would be bypassed.
        """
        self.check_parts()
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise UnsupportedModelError(
                "a sparsified model is for inference: call model.eval() and run it under torch.no_grad() or "
                "torch.inference_mode(), or undo it with countdown.restore_(model)."
            )
        if self.forced_dense or (self.apply_to == "decode" and x.shape[-2] != 1):
            y: Tensor = self.dense(x)
            return y
        return self.sparse(x)

    @property
    def proxy_bytes(self) -> int:
        """Bytes beside the weights."""
        return 0

    def extra_repr(self) -> str:
        """Name what decides, for `print(model)`."""
        return f"{self.method}, apply_to={self.apply_to}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseSite:
        # model.half() and the like cast float buffers; thresholds keep their bits and only change device.
        exact = self.per_term
        super()._apply(fn, recurse)
        self.per_term = exact.to(self.per_term.device)
        self._free_counters()
        self.lay_out()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled module."""
        super().__setstate__(state)
        self._free_counters()

    def lay_out(self) -> None:
        """Store the weights, and what is derived from them, as the backend that will compute wants them.

        What is unpickled on another device is not: call `model.to(device)`, which does.
        """

    def make_proxy(self) -> None:
        """Make what is derived from the weights."""

    def _free_counters(self) -> None:
        # Made under inference_mode, the counters could not be counted up outside of it.
        if self.counters.is_inference():
            with torch.inference_mode(False):
                self.counters = self.counters.clone()


class SparseFFN(SparseSite):
    """A gated FFN that computes, for each token, only the active neurons.

    It shares the dictionary of children with the module it replaces, so names, parameters and `state_dict` stay as
    they are, and whatever replaces a child, here or there, is seen by both.
    """

    kind = GatedFFN.kind

    def __init__(
        self,
        site: GatedFFN,
        method: Method,
        per_term: Tensor,
        *,
        apply_to: str,
        importance: Tensor | None = None,
        proxy: list[Tensor] | None = None,
    ) -> None:
        super().__init__(site, method, per_term, apply_to=apply_to)
        self.importance = importance
        self.proxy = proxy and [part.to(site.device) for part in proxy]
        if method.proxy_bits and importance is None:
            raise ProfileError(f"the profile has no importance of the inputs of {site.name}; calibrate again.")
        self._modules = site.module._modules
        self.projections = (site.gate, site.up, site.down)
        self.activation = site.activation
        if self.proxy is None:
            self.make_proxy()

    @property
    def refusal(self) -> str | None:
        """See `SparseSite.refusal`."""
        return self._refusal(laid_out=True)

    @property
    def planned_refusal(self) -> str | None:
        """See `SparseSite.planned_refusal`."""
        return self._refusal(laid_out=False)

    def release(self) -> nn.Module:
        """Return the dense module, W_down laid out as `nn.Linear` does."""
        down = self.projections[-1].linear(self)
        assert isinstance(down.weight, Tensor)
        if not down.weight.is_contiguous():
            _store(down, down.weight.contiguous())
        return self.dense

    def check_parts(self) -> None:
        """See `SparseSite.check_parts`."""
        for rows in self.projections:
            check_plain(rows.child, rows.linear(self))

    def lay_out(self) -> None:
        # Gate and up have a neuron's weights in a row already. W_down becomes the transposed view of such a matrix:
        # same name, shape and values, one copy, and as good for a dense product.
        down = self.projections[-1].linear(self)
        assert isinstance(down.weight, Tensor)
        if self.planned_refusal is None and not down.weight.t().is_contiguous():
            _store(down, down.weight.t().contiguous().t())
        # A plain list, so that casts leave it alone.
        if self.proxy is not None:
            with torch.inference_mode(False):
                proxy = [part.to(self.per_term.device) for part in self.proxy]
                self.proxy = in_tiles(proxy) if self.backend == "cpu" else in_rows(proxy, self.terms)

    def _refusal(self, *, laid_out: bool) -> str | None:
        weights = [rows.of(self)[0] for rows in self.projections]
        return backends.refuses_ffn(
            weights,
            decision=self.method.decision,
            indicator=self.method.indicator.name,
            activation=self.activation,
            proxy_bits=self.method.proxy_bits or None,
            laid_out=laid_out,
        )

    def sparse(self, x: Tensor) -> Tensor:
        """Return y `[..., d]` of the active neurons for x `[..., d]`."""
        weights, biases = zip(*(rows.of(self) for rows in self.projections), strict=True)
        return torch.ops.countdown.sparse_ffn(  # type: ignore[no-any-return]
            x,
            weights,
            biases,
            self.per_term,
            self.counters,
            proxy=self.proxy,
            activation=self.activation,
            **self._decision,
        )

    def make_proxy(self) -> None:
        """Make the proxy from the weights as they are now, where the method has one."""
        if self.importance is None:
            return
        site = GatedFFN("", self.dense, *self.projections, self.activation)
        with torch.inference_mode(False):
            self.proxy = site.proxy(self.importance, self.method.proxy_bits)

    def active(self, x: Tensor) -> Tensor:
        """Return the active set of each token, bool `[..., h]`, for x `[..., d]`."""
        weights, biases = zip(*(rows.of(self) for rows in self.projections), strict=True)
        return torch.ops.countdown.select(  # type: ignore[no-any-return]
            x, weights, biases, self.per_term, proxy=self.proxy, activation=self.activation, **self._decision
        )

    @property
    def proxy_bytes(self) -> int:
        """Bytes of the proxy beside the weights, those that fill its last tile included."""
        return sum(part.nbytes for part in self.proxy or ())


class SparseLinear(SparseSite):
    """A linear layer that reads, for each token, only the columns of its active input channels.

    It shares the dictionary of parameters with the linear it replaces, so that whatever moves, casts or assigns
    them, here or there, is seen by both.
    """

    kind = LinearInput.kind

    def __init__(self, site: LinearInput, method: Method, per_term: Tensor, *, apply_to: str) -> None:
        super().__init__(site, method, per_term, apply_to=apply_to)
        self._parameters = site.module._parameters
        self.in_features, self.out_features = site.module.in_features, site.module.out_features

    @property
    def refusal(self) -> str | None:
        """See `SparseSite.refusal`."""
        return "it has no kernel for linear layers"

    def sparse(self, x: Tensor) -> Tensor:
        """Return z `[..., d_out]` of the active input channels for x `[..., d_in]`."""
        return torch.ops.countdown.sparse_linear(  # type: ignore[no-any-return]
            x, self.weight, self.bias, self.per_term, self.counters, **self._decision
        )


def _follow_weights(module: nn.Module, _: object) -> None:
    assert isinstance(module, SparseSite)
    module.make_proxy()
    module.lay_out()


def _store(linear: nn.Module, weight: Tensor) -> None:
    """Let the parameter of a linear hold the same values in another layout; the old ones are freed."""
    with torch.inference_mode(False), torch.no_grad():
        linear.weight.data = weight.clone(memory_format=torch.preserve_format) if weight.is_inference() else weight


_SPARSE: dict[str, type[SparseSite]] = {cls.kind: cls for cls in (SparseFFN, SparseLinear)}


def sparse_module(site: Site, method: Method, per_term: Tensor, *, apply_to: str, **proxy: Any) -> SparseSite:
    """Return the module that runs in place of `site`.

    Args:
        site, method, per_term, apply_to: As for `SparseSite`.
        proxy: For a method with a proxy: `importance`, mean squares of an FFN's inputs, float32 `[d]`, and `proxy`, the
            proxy if it is made already.

    Raises:
        ProfileError: A method with a proxy has no importance.
    """
    return _SPARSE[site.kind](site, method, per_term, apply_to=apply_to, **(proxy if method.proxy_bits else {}))


# Called with a site, its input, and the factors of its terms, each [..., terms]; returns the active set, None for all.
Observer = Callable[[Site, Tensor, tuple[Tensor, ...]], Tensor | None]


class ObservedSite(nn.Module):
    """A site that shows its factors as it computes; stands in during calibration.

    Args:
        site: What to stand in for.
        observe: Called at every forward.
    """

    def __init__(self, site: Site, observe: Observer) -> None:
        super().__init__()
        self._site = site
        self._observe = observe

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum over the active terms that the observer names."""
        factors = self._site.project(x)
        active = self._observe(self._site, x, factors)
        coefficients = coefficients_of(factors)
        return self._site.combine(coefficients if active is None else torch.where(active, coefficients, 0))

    def __getattr__(self, name: str) -> Any:
        # Models look at more of a linear than its forward: at the dtype of its weight, say.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._site.module, name)


def coefficients_of(factors: tuple[Tensor, ...]) -> Tensor:
    """Return the product of the factors: what each term's column is multiplied by."""
    first, *others = factors
    for other in others:
        first = first * other
    return first


@contextmanager
def observed(model: nn.Module, sites: Sequence[Site], observe: Observer) -> Iterator[None]:
    """Within the context, call `observe` at every forward of every site."""
    try:
        for site in sites:
            model.set_submodule(site.name, ObservedSite(site, observe))
        yield
    finally:
        for site in sites:
            model.set_submodule(site.name, site.module)


def check_dense(model: nn.Module) -> None:
    """Raise UnsupportedModelError if `model` is sparsified or in training mode."""
    if sparse_sites(model):
        raise UnsupportedModelError("the model is sparsified already; undo it with countdown.restore_(model).")
    if model.training:
        raise UnsupportedModelError("the model is in training mode; call model.eval() first.")


def sparse_sites(model: nn.Module) -> dict[str, SparseSite]:
    """Return the sparse modules of `model` by name; empty for a model that is not sparsified."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseSite)}


@contextmanager
def running(model: nn.Module, mode: str) -> Iterator[None]:
    """Within the context, run a sparsified model as `dense`, or sparse on `decode` or `all` tokens."""
    modules = sparse_sites(model).values()
    before: list[tuple[Any, ...]] = [(module.apply_to, module.forced_dense) for module in modules]
    try:
        for module in modules:
            module.forced_dense = mode == "dense"
            module.apply_to = module.apply_to if mode == "dense" else mode
        yield
    finally:
        for module, (apply_to, forced_dense) in zip(modules, before, strict=True):
            module.apply_to, module.forced_dense = apply_to, forced_dense
