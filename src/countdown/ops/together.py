"""An op of decode loops: tokens through several sparse linears that read the same input, in one launch if there is one.

`sparse_together`: x [..., d] through one to `MOST_TOGETHER` linears, each with thresholds and counters of its own,
their outputs side by side: [..., Σ outputs]. All tokens are generated. Else as `sparse`, see `ops.call`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from countdown.ops.call import Call
from countdown.weights import FORMATS

MOST_TOGETHER = 3
SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] per_term, Tensor(a!)[] counters, *, str[] formats, "
    "str selector, str rule, int[] drops) -> Tensor"
)


def calls_of(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    per_term: Sequence[Tensor],
    counters: Sequence[Tensor],
    *,
    formats: Sequence[str],
    selector: str,
    rule: str,
    drops: Sequence[int],
) -> list[Call]:
    """Return the call of each linear, checked.

    Raises:
        ValueError: They do not fit together.
    """
    if not 1 <= len(formats) <= MOST_TOGETHER:
        raise ValueError(f"formats has {len(formats)} entries, expected 1 to {MOST_TOGETHER}, one for each linear")
    if any(len(given) != len(formats) for given in (biases, per_term, counters, drops)):
        raise ValueError(f"biases, per_term, counters or drops has not {len(formats)} entries, one for each linear")
    calls, rest = [], list(weights)
    for place, name in enumerate(formats):
        count = len(FORMATS.get(name).part_names)
        parts, rest = rest[:count], rest[count:]
        calls.append(
            Call.of(
                "sparse", x, parts, [biases[place]], per_term[place], counters[place], None,
                kind="linear", formats=[name], activation="", selector=selector, rule=rule, drop=drops[place],
            )
        )  # fmt: skip
    if rest:
        raise ValueError(f"weights has {len(rest)} tensors more than {', '.join(formats)}")
    return calls


def together(x: Tensor, *args: list[Tensor], **names: object) -> Tensor:
    """Return the results of `sparse`, side by side."""
    calls = calls_of(x, *args, **names)  # type: ignore[arg-type]
    return torch.cat([_sparse(call) for call in calls], dim=-1)


def _sparse(call: Call) -> Tensor:
    (weight,) = call.sum.weights
    assert call.selector is not None
    y: Tensor = torch.ops.countdown.sparse(
        call.x, list(weight.parts), list(call.sum.biases), call.per_term, call.counters, None,
        kind="linear", formats=[weight.format], activation="",
        selector=call.selector.name, rule=call.rule, drop=call.drop,
    )  # fmt: skip
    return y


def _fake(x: Tensor, *args: list[Tensor], **names: object) -> Tensor:
    calls = calls_of(x, *args, **names)  # type: ignore[arg-type]
    return x.new_empty((*x.shape[:-1], sum(call.sum.outputs for call in calls)))


# Schema, fake and reference, by name.
OPS = {"sparse_together": (SCHEMA, _fake, together)}
