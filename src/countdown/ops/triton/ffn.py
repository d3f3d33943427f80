"""The sparse FFN on a device that Triton compiles for: what kernels are given, workspaces, launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from countdown.ops.base import contiguous, flat
from countdown.ops.call import Call
from countdown.ops.triton import deciders, kernels, launch, loaders
from countdown.sums import Sum
from countdown.weights import Weight

Argument = tuple[Any, ...]
Biases = tuple[Tensor | None, Tensor | None]

# By weight format: a weight as its function in `loaders` takes it, where rows (`dim` 0) or columns (1) of the matrix
# are gathered.
FORMATS: dict[str, Callable[[Weight, int], Argument]] = {
    "plain": lambda weight, dim: (loaders.plain, weight.parts[0], weight.parts[0].stride(dim)),
}


def weight_argument(weight: Weight, dim: int = 0) -> Argument:
    """Return a weight as kernels take it, see `loaders`; of `dim` 1 its columns are what they call rows."""
    return FORMATS[weight.format](weight, dim)


class FFN:
    """Tokens and an FFN as kernels take them.

    Args:
        x: `[T, d]`, entries of a token side by side.
        sum_: The FFN, W_down laid out by neuron.
        added: What is predicted of dropped neurons, if it is; see `compensation.affine`.
        phases: Of the tokens.
    """

    def __init__(self, x: Tensor, sum_: Sum, added: Sequence[Weight] = (), phases: Tensor | None = None) -> None:
        gate, up, down = sum_.weights
        self.x, self.activation = x, sum_.activation
        self.tokens, self.d, self.h = len(x), x.shape[1], sum_.terms
        self.gate, self.up, self.down = weight_argument(gate), weight_argument(up), weight_argument(down, 1)
        self.gate_bias, self.up_bias, self.down_bias = contiguous(sum_.biases)
        dtypes = {weight.parts[0].dtype for weight in sum_.weights}
        self.itemsize = max(dtype.itemsize for dtype in dtypes)
        self.mixed = dtypes != {x.dtype}
        self.found = launch.hardware(x.device)
        self.phases = phases
        self.predicted: Argument | None = None
        if added:
            matrix, channels, bias = (part.in_rows().parts for part in added)
            levels, scales = matrix
            self.predicted = levels.view(torch.int32), scales, *channels, *bias, x, x.stride(0)

    @property
    def in_matrix_instructions(self) -> bool:
        """Whether products of several tokens are matrix instructions of 16 bits."""
        return self.itemsize == 2 and not self.mixed

    def weights(self, gate_first: bool) -> Argument:
        """Return the weights, first what decides."""
        return (self.gate, self.up, self.down) if gate_first else (self.up, self.gate, self.down)

    def biases(self, gate_first: bool) -> Biases:
        """Return the biases of the first two weights."""
        return (self.gate_bias, self.up_bias) if gate_first else (self.up_bias, self.gate_bias)


class Decider(NamedTuple):
    """What decides, as kernels take it.

    Args:
        read, decide: See `deciders`.
        by: The tensors that `decide` reads.
        how: The constants of both.
        gate_first: Whether the gate is what decides. [up, or neither]
        size: Bytes that it reads of a neuron; None for a row of the first weight, which gives one of the two factors.
        second: Thresholds of a second look, if there is one.
    """

    read: Any
    decide: Any
    by: Argument
    how: Argument = ()
    gate_first: bool = False
    size: int | None = None
    second: Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether it finds one of the two factors."""
        return self.size is None


def _by_projection(ffn: FFN, call: Call, *, gate_first: bool) -> Decider:
    by = (ffn.biases(gate_first)[0], call.first.contiguous())
    second = None if call.second is None else call.second.contiguous()
    return Decider(deciders.as_they_are, deciders.by_projection, by, (gate_first,), gate_first, second=second)


def _by_proxy(ffn: FFN, call: Call) -> Decider:
    gate, up = ((part.parts[0].view(torch.int32), part.parts[1]) for part in (part.in_rows() for part in call.parts))
    how = launch.packed(ffn.d, ffn.found)
    by = (gate, up, (ffn.gate_bias, ffn.up_bias), call.first.contiguous())
    return Decider(deciders.rounded_here, deciders.by_proxy, by, how, size=8 * how[1])


def _by_sets(ffn: FFN, active: Tensor) -> Decider:
    return Decider(deciders.as_they_are, deciders.given, (active.view(torch.int8), ffn.h), size=ffn.tokens)


# By selector.
DECIDERS: dict[str, Callable[[FFN, Call], Decider]] = {
    "up": partial(_by_projection, gate_first=False),
    "gate": partial(_by_projection, gate_first=True),
    "proxy-4": _by_proxy,
}


@launch.on_its_device
def run(x: Tensor, call: Call) -> Tensor:
    """Return the result of a call; see `Backend.run`.

    Args:
        x: The tokens, for the device.
        call: Of one to `MOST_TOKENS` tokens.
    """
    ffn = FFN(flat(x), call.sum, call.added, call.phases)
    if call.op == "select":
        return _select(ffn, call)
    y = _sparse(ffn, call) if call.op == "sparse" else _given(ffn, call)
    return y.view(call.x.shape)


def _sparse(ffn: FFN, call: Call) -> Tensor:
    assert call.selector is not None
    decider = DECIDERS[call.selector.name](ffn, call)
    # Matrix instructions win where most rows are read, as for deciding by a weight.
    tiles = ffn.tokens == 2 and decider.known and ffn.in_matrix_instructions
    if not tiles and (config := _row_blocks(ffn, decider, ffn.h - call.drop)):
        return _sum_rows(ffn, decider, config, call.phases, call.counters)
    if decider.known:
        return _sum_tiles(ffn, *_coefficients(ffn, decider, call))
    active = call.x.new_empty((ffn.tokens, ffn.h), dtype=torch.bool)
    _select_rows(ffn, decider, call.phases, active, call.counters)
    return _sum_given(ffn, active)


def _select(ffn: FFN, call: Call) -> Tensor:
    assert call.selector is not None
    decider, active = DECIDERS[call.selector.name](ffn, call), call.empty()
    if decider.known:
        _coefficients(ffn, decider, call, active)
    else:
        _select_rows(ffn, decider, call.phases, active, None)
    return active


def _given(ffn: FFN, call: Call) -> Tensor:
    assert call.active is not None
    active = call.active.contiguous().view(ffn.tokens, ffn.h)
    if ffn.tokens > 1:
        return _sum_given(ffn, active, call.counters)
    indices, count = (ffn.x.new_empty(size, dtype=torch.int32) for size in (ffn.h, 1))
    options = launch.Launch((1,), {"BLOCK": 1024}, 4).options(ffn.found)
    kernels.list_active[(1,)](active.view(torch.int8), indices, count, call.counters, ffn.h, **options)
    return _sum_listed(ffn, indices, count)


@launch.on_its_device
def listed_ffn(x: Tensor, sum_: Sum, indices: Tensor, count: Tensor) -> Tensor:
    """Return y `[1, d]` of one token whose active neurons are listed.

    Args:
        x: `[1, d]`.
        sum_: The FFN, W_down laid out by neuron.
        indices: int32 `[h]`, of which the first `count[0]` name different neurons.
        count: int32 `[1]`, on the device.
    """
    return _sum_listed(FFN(flat(x), sum_), indices, count)


def _sum_listed(ffn: FFN, indices: Tensor, count: Tensor) -> Tensor:
    config = launch.listed(ffn.d, ffn.h, ffn.itemsize, ffn.found)
    partial_sums = ffn.x.new_empty((*config.grid, 1, ffn.d), dtype=torch.float32)
    kernels.sum_listed[config.grid](
        ffn.x, *ffn.weights(False), ffn.biases(False), indices, count, partial_sums, ffn.h, ffn.d,
        ACT=ffn.activation, **config.options(ffn.found),
    )  # fmt: skip
    return _reduce(ffn, partial_sums)


def _sum_given(ffn: FFN, active: Tensor, counters: Tensor | None = None) -> Tensor:
    """Return y `[T, d]` of several tokens with their active sets `[T, h]`, and count where there are counters."""
    decider = _by_sets(ffn, active)
    if config := _row_blocks(ffn, decider, ffn.h):
        return _sum_rows(ffn, decider, config, None, counters)
    return _sum_tiles(ffn, *_coefficients(ffn, decider, None, active, counters))


def _row_blocks(ffn: FFN, decider: Decider, expected: int) -> launch.Launch | None:
    sizes = ffn.d, ffn.h, ffn.itemsize, ffn.tokens, expected, ffn.found
    return launch.row_blocks(*sizes, read=decider.size, looks=1 if decider.second is None else 2)


def _sum_rows(
    ffn: FFN, decider: Decider, config: launch.Launch, phases: Tensor | None, counters: Tensor | None
) -> Tensor:
    """Return y `[T, d]` of one token or two."""
    partial_sums = ffn.x.new_empty((*config.grid, ffn.tokens, ffn.d), dtype=torch.float32)
    kernels.decide_and_sum[config.grid](
        ffn.x, ffn.x.stride(0), decider.by, *ffn.weights(decider.gate_first), ffn.biases(decider.gate_first),
        decider.second, phases, partial_sums, counters, ffn.h, ffn.d,
        READ=decider.read, DECIDE=decider.decide, HOW=decider.how, KNOWN=decider.known, GATE_FIRST=decider.gate_first,
        ACT=ffn.activation, **config.options(ffn.found),
    )  # fmt: skip
    return _reduce(ffn, partial_sums, early=decider.decide is not deciders.given)


def _select_rows(ffn: FFN, decider: Decider, phases: Tensor | None, active: Tensor, counters: Tensor | None) -> None:
    """Fill active `[..., h]`, and count where there are counters; by a proxy, whose tokens are rounded before."""
    config = launch.row_selection(ffn.h, ffn.tokens, decider.size or 0, ffn.found)
    kernels.select_rows[config.grid](
        _quantised(ffn), 0, decider.by, phases, active.view(torch.int8), counters, ffn.h, ffn.d,
        READ=deciders.rounded_before, DECIDE=decider.decide, HOW=decider.how, ACT=ffn.activation,
        **config.options(ffn.found),
    )  # fmt: skip


def _quantised(ffn: FFN) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens in 8 bits as `quantise_tokens` leaves them."""
    width, _, group, _ = launch.packed(ffn.d, ffn.found)
    config = launch.quantisation(ffn.d, ffn.tokens, ffn.found)
    words = ffn.x.new_empty((ffn.tokens, 2, width), dtype=torch.int32)
    sums = ffn.x.new_empty((ffn.tokens, width // group), dtype=torch.float32)
    steps = ffn.x.new_empty(ffn.tokens, dtype=torch.float32)
    deciders.quantise_tokens[config.grid](
        ffn.x, words, sums, steps, ffn.d, ffn.x.stride(0), **config.options(ffn.found)
    )
    return words, sums, steps


def _coefficients(
    ffn: FFN, decider: Decider, call: Call | None, active: Tensor | None = None, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return coefficients `[h, TILE_TOKENS]` and which neurons any token needs `[h]`.

    Args:
        ffn: Of several tokens.
        decider: By a projection, or by sets.
        call: What thresholds, phases and counters it has; None where sets are given.
        active: The sets `[T, h]`; with a call they are filled, and nothing else is.
        counters: Of a call whose sets are given.
    """
    config = launch.tiled(ffn.d, ffn.h, ffn.itemsize, ffn.found, mixed=ffn.mixed)
    selects = call is not None and active is not None
    s = None if selects else ffn.x.new_empty((ffn.h, launch.TILE_TOKENS))
    needs = None if selects else ffn.x.new_empty(ffn.h, dtype=torch.int8)
    thresholds, phases = (None, None) if call is None else (decider.by[1], call.phases)
    counters = counters if call is None else call.counters
    kernels.coefficients[config.grid](
        ffn.x, ffn.x.stride(0), *ffn.weights(decider.gate_first)[:2], ffn.biases(decider.gate_first), thresholds,
        decider.second, phases, None if active is None else active.view(torch.int8), s, needs, counters, ffn.tokens,
        ffn.d, ffn.h, GATE_FIRST=decider.gate_first, ACT=ffn.activation, **config.options(ffn.found),
    )  # fmt: skip
    return s, needs  # type: ignore[return-value]


def _sum_tiles(ffn: FFN, s: Tensor, needs: Tensor) -> Tensor:
    config, each = launch.columns(ffn.d, ffn.h, ffn.itemsize, ffn.found, mixed=ffn.mixed)
    partial_sums = ffn.x.new_empty((config.grid[1], ffn.tokens, ffn.d), dtype=torch.float32)
    kernels.sum_columns[config.grid](
        s, needs, ffn.down, partial_sums, ffn.tokens, ffn.d, ffn.h, each, **config.options(ffn.found)
    )
    return _reduce(ffn, partial_sums)


def _reduce(ffn: FFN, partial_sums: Tensor, *, early: bool = False) -> Tensor:
    """Return y `[T, d]` from partial sums `[P, T, d]`; early: those of `decide_and_sum`."""
    y = ffn.x.new_empty((ffn.tokens, ffn.d))
    programs = len(partial_sums)
    how = None if ffn.predicted is None else launch.packed(ffn.d, ffn.found)
    config = launch.reduction(ffn.d, programs, ffn.tokens, how, early=early)
    kernels.reduce[config.grid](
        partial_sums, ffn.down_bias, y, ffn.predicted, ffn.phases, programs, ffn.tokens, ffn.d,
        **config.options(ffn.found),
    )  # fmt: skip
    return y
