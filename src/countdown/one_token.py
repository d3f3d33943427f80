"""One token's linears and its attention in our kernels, for decode loops.

Linears that read the very same input run in one launch, dense ones and sparse ones alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from countdown.modules import SparseModule
from countdown.ops.together import MOST_TOGETHER

ATTENTION = "countdown"


@contextmanager
def one_token(model: Any, groups: list[list[Projection]]) -> Iterator[None]:
    """Within the context, linears of one token, a group a launch, and its attention run in our kernels."""
    switched = model.config._attn_implementation == "sdpa"
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        if switched:
            model.set_attn_implementation(_register_attention())
        for linears in groups:
            for linear, forward in zip(linears, _projections(linears), strict=True):
                vars(linear)["forward"] = forward
        yield
    finally:
        for linear in (linear for linears in groups for linear in linears):
            vars(linear).pop("forward", None)
        # Not by `set_attn_implementation`, which does not take what it finds in parts that were never set.
        for config, attention in before if switched else ():
            config._attn_implementation = attention


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield the configs of a model and its parts, a part's after that of the whole, which sets it too."""
    from transformers import PreTrainedModel

    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in waiting:
        yield config
        parts = (getattr(config, name, None) for name in config.sub_configs)
        waiting.extend(part for part in parts if part is not None)


Projection = nn.Linear | SparseModule


def siblings(model: Any, given: dict[str, Any]) -> tuple[list[list[Projection]], Any]:
    """Return the linears that a step runs in our kernels, those in a row that read the same input together; its output.

    Of sparse ones, which run in kernels by themselves, only those that can share a launch.
    """
    seen: list[tuple[Projection, Tensor]] = []
    linears = [module for module in model.modules() if _bare(module) or _shares_launches(module)]

    def keep(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Some linears run over the whole cache, as those of latent attention.
        if args[0].numel() == linear.in_features:
            seen.append((linear, args[0]))  # type: ignore[arg-type]

    hooks = [linear.register_forward_pre_hook(keep) for linear in linears]
    try:
        output = model(**given)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[Projection]] = []
    for place, (linear, x) in enumerate(seen):
        same = place > 0 and x is seen[place - 1][1] and _alike(linear, groups[-1][-1])
        if same and len(groups[-1]) < MOST_TOGETHER:
            groups[-1].append(linear)
        else:
            groups.append([linear])
    # One that runs twice in a step would overwrite what the other of its group waits for.
    runs = Counter(id(linear) for linear, _ in seen)
    groups = [group for group in groups if all(runs[id(linear)] == 1 for linear in group)]
    return [group for group in groups if len(group) > 1 or type(group[0]) is nn.Linear], output


def _bare(module: nn.Module) -> bool:
    """Return whether a module is a linear with nothing put on it that would be bypassed."""
    # A weight of another class, as quantised ones are, computes in its own way.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _shares_launches(module: nn.Module) -> bool:
    """Return whether a module is a sparse linear that kernels compute several of at once: on GPUs."""
    if not isinstance(module, SparseModule) or module.kind != "linear" or module.forced_dense or _hooked(module):
        return False
    return _on_gpu(module) and module.refusal is None and not module.parts


def _on_gpu(site: SparseModule) -> bool:
    return site.per_term.is_cuda


def _alike(one: Projection, other: Projection) -> bool:
    if type(one) is not type(other) or one.weight.dtype != other.weight.dtype:
        return False
    return not isinstance(one, SparseModule) or _decision(one) == _decision(other)


def _decision(site: Any) -> tuple[str, str, str]:
    return site.selector.name, site.method.decision, site.compensation


def _projections(linears: list[Projection]) -> list[Callable[[Tensor], Tensor]]:
    """Return a forward for each of the linears: the first computes all, the others take what is theirs."""
    sizes: list[int] = [linear.out_features for linear in linears]
    waiting: dict[int, Tensor] = {}
    product = _sparse if isinstance(linears[0], SparseModule) else _dense

    def compute(x: Tensor) -> Tensor:
        y = product(x.reshape(1, -1), linears)
        parts = y.view(*x.shape[:-1], -1).split(sizes, dim=-1)
        waiting.update(enumerate(parts[1:], start=1))
        first: Tensor = parts[0]
        return first

    return [compute, *(partial(_take, waiting, place) for place in range(1, len(linears)))]


def _dense(x: Tensor, linears: list[Any]) -> Tensor:
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    return torch.ops.countdown.project(x, weights, biases)  # type: ignore[no-any-return]


def _sparse(x: Tensor, sites: list[Any]) -> Tensor:
    arguments, options = zip(*(site.arguments() for site in sites), strict=True)
    weights = [part for parts, _ in arguments for part in parts]
    biases = [bias for _, (bias,) in arguments]
    per_term, counters = [site.per_term for site in sites], [site.counters for site in sites]
    formats = [name for of_site in options for name in of_site["formats"]]
    return torch.ops.countdown.sparse_together(  # type: ignore[no-any-return]
        x, weights, biases, per_term, counters, formats=formats, selector=options[0]["selector"],
        rule=options[0]["rule"], drops=[of_site["drop"] for of_site in options],
        compensation=options[0]["compensation"],
    )  # fmt: skip


def _take(waiting: dict[int, Tensor], place: int, x: Tensor) -> Tensor:
    return waiting.pop(place)


def _register_attention() -> str:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query attending to all keys; see `attend_one`."""
    if key.shape != value.shape:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)  # type: ignore[no-any-return]
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = torch.ops.countdown.attend_one(query, key, value, mask, scale)
    return out.transpose(1, 2), None
