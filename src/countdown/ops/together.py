"""An op of decode loops: tokens through several sparse linears that read the same input, in one launch if there is one.

`sparse_together`: x [..., d] through one to `MOST_TOGETHER` linears, each with thresholds and counters of its own,
their outputs side by side: [..., Σ outputs]. All tokens are generated. Weights and formats are those of the first
linear, its compensation's among them, then those of the next. Else as `sparse`, see `ops.call`.
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
    'str selector, str rule, int[] drops, str compensation="") -> Tensor'
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
    compensation: str = "",
) -> list[Call]:
    """Return the call of each linear, checked.

    Raises:
        ValueError: They do not fit together.
    """
    count = len(per_term)
    if not 1 <= count <= MOST_TOGETHER:
        raise ValueError(f"per_term has {count} entries, expected 1 to {MOST_TOGETHER}, one for each linear")
    if any(len(given) != count for given in (biases, counters, drops)) or len(formats) % count:
        raise ValueError(f"formats, biases, counters or drops are not those of {count} linears, as per_term has")
    calls, rest = [], list(weights)
    each = len(formats) // count
    for place in range(count):
        own = formats[place * each : (place + 1) * each]
        size = sum(len(FORMATS.get(name).part_names) for name in own)
        parts, rest = rest[:size], rest[size:]
        calls.append(
            Call.of(
                "sparse", x, parts, [biases[place]], per_term[place], counters[place], None, kind="linear",
                formats=own, activation="", selector=selector, rule=rule, drop=drops[place], compensation=compensation,
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
    weights = (*call.sum.weights, *call.added)
    assert call.selector is not None
    y: Tensor = torch.ops.countdown.sparse(
        call.x, [part for weight in weights for part in weight.parts], list(call.sum.biases), call.per_term,
        call.counters, None, kind="linear", formats=[weight.format for weight in weights], activation="",
        selector=call.selector.name, rule=call.rule, drop=call.drop,
        compensation="" if call.compensation is None else call.compensation.name,
    )  # fmt: skip
    return y


def _fake(x: Tensor, *args: list[Tensor], **names: object) -> Tensor:
    calls = calls_of(x, *args, **names)  # type: ignore[arg-type]
    return x.new_empty((*x.shape[:-1], sum(call.sum.outputs for call in calls)))


# Schema, fake and reference, by name.
OPS = {"sparse_together": (SCHEMA, _fake, together)}
