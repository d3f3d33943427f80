"""The contract of the ops: schemas, what arguments must satisfy, and fakes for torch.compile.

Letters: T tokens in a call (all leading dimensions of x taken together), d hidden size, h neurons.

| argument | shape, dtype | meaning |
|---|---|---|
| x | [..., d], the dtype of the weights | input of the FFN or linear |
| weights | by `weight_format` | `plain`: W_gate [h, d], W_up [h, d], W_down [d, h], any strides |
| biases | [h], [h], [d], each or None | of gate, up and down |
| weight, bias | [d_out, d], [d_out] or None | of a linear |
| per_neuron, per_channel | [h] or [d], float32 | decision threshold: τ_i; decision topk: weights m_i |
| counters | [2], int64 | incremented by T and by the active terms summed over the T tokens |
| proxy | levels and scales of gate, and of up | for indicator `proxy`: rows (see `proxy`) or tiles (`proxy_tiles`) |
| active | [..., h], bool | the active set of each token |
| decision | `threshold` | term i is inactive iff indicator ≤ τ_i, so a NaN stays active |
|          | `topk` | the `drop` terms of smallest indicator · m_i are inactive, ties by lower index first |
| drop | int, 0 ≤ drop ≤ h or d | used by topk only |
| indicator | a name known to `indicators` | what decides |
| activation | a key of `activations.ACTIVATIONS` | act |

The terms of an FFN are its neurons, those of a linear its input channels. Of a token whose x holds a NaN or an
infinity, every term is active: it is computed as in the dense model.

`sparse_ffn` and `sparse_linear` are the ops that models run. `select` and `given_ffn` are the halves of the first,
for tests and benchmarks; where a backend sums in another order, an indicator at its very threshold may fall on its
other side. Outputs: y [..., d] like x (z [..., d_out] for a linear), and for `select` the active sets [..., h], bool.

Two dense ops of one token are for decode loops. `project_one`: x [1, d] through one to three linears, weights
[d_out_k, d], side by side: [1, Σ d_out_k]. `attend_one`: q [1, heads, 1, size] attends to keys and values [1, groups,
length, size], heads a multiple of groups, those that mask [1, 1, 1, length], bool, lets it see: [1, heads, 1, size].

Shapes are static and nothing is read back to the host. Arguments that do not fit raise ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from countdown.ops.activations import ACTIVATIONS
from countdown.ops.indicators import get_indicator
from countdown.ops.proxy_format import BITS, group_of, padded
from countdown.ops.proxy_tiles import are_tiles, tile_shapes

LIBRARY = torch.library.Library("countdown", "DEF")

_FFN = "Tensor x, Tensor[] weights, Tensor?[] biases"
_DECISION = "str decision, int drop, str indicator"
_FORM = "str activation, str weight_format='plain'"

_DECIDING = f"*, Tensor[]? proxy=None, {_DECISION}, {_FORM}"
LIBRARY.define(f"sparse_ffn({_FFN}, Tensor per_neuron, Tensor(a!) counters, {_DECIDING}) -> Tensor")
LIBRARY.define(f"select({_FFN}, Tensor per_neuron, {_DECIDING}) -> Tensor")
LIBRARY.define(f"given_ffn({_FFN}, Tensor active, *, {_FORM}) -> Tensor")
LIBRARY.define(
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, Tensor per_channel, Tensor(a!) counters, *, "
    f"{_DECISION}, str weight_format='plain') -> Tensor"
)
LIBRARY.define("project_one(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor")
LIBRARY.define("attend_one(Tensor q, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor")


def check_ffn(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str, weight_format: str
) -> None:
    """Raise ValueError unless input, weights and biases fit together."""
    _check_format(weight_format)
    if len(weights) != 3:
        raise ValueError(f"weights has {len(weights)} tensors, expected gate, up and down")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is '{activation}', expected one of: {', '.join(ACTIVATIONS)}")
    gate, up, down = weights
    h, d = gate.shape
    if x.shape[-1] != d:
        raise ValueError(f"x is {tuple(x.shape)}, expected [..., {d}] to fit W_gate {(h, d)}")
    _check_weight("W_gate", gate, (h, d), x.dtype)
    _check_weight("W_up", up, (h, d), x.dtype)
    _check_weight("W_down", down, (d, h), x.dtype)
    if len(biases) != 3:
        raise ValueError(f"biases has {len(biases)} entries, expected gate, up and down, each a tensor or None")
    _check_bias("bias of gate", biases[0], h)
    _check_bias("bias of up", biases[1], h)
    _check_bias("bias of down", biases[2], d)


def _check_format(weight_format: str) -> None:
    if weight_format != "plain":
        raise ValueError(f"weight_format is '{weight_format}', expected 'plain'")


def _check_weight(name: str, weight: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if weight.shape != shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}, expected {shape}")
    if weight.dtype != dtype:
        raise ValueError(f"{name} is {weight.dtype}, expected {dtype} like x")


def _check_bias(name: str, bias: Tensor | None, size: int) -> None:
    if bias is not None and bias.shape != (size,):
        raise ValueError(f"{name} has the wrong shape, expected {(size,)}")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, weight_format: str) -> None:
    """Raise ValueError unless input, weight and bias of a linear fit together."""
    _check_format(weight_format)
    out, d = weight.shape
    if x.shape[-1] != d:
        raise ValueError(f"x is {tuple(x.shape)}, expected [..., {d}] to fit W {(out, d)}")
    _check_weight("W", weight, (out, d), x.dtype)
    _check_bias("bias", bias, out)


def check_projections(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> None:
    """Raise ValueError unless one token fits one to three linears."""
    if x.dim() != 2 or x.shape[0] != 1:
        raise ValueError(f"x is {tuple(x.shape)}, expected one token [1, d]")
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"weights has {len(weights)} tensors, expected 1 to 3")
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries, expected {len(weights)}")
    for weight, bias in zip(weights, biases, strict=True):
        check_linear(x, weight, bias, "plain")


def check_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError unless one token's queries fit keys, values and mask."""
    if not (q.dim() == keys.dim() == 4 and keys.shape == values.shape):
        raise ValueError("q, keys or values have the wrong dimensions")
    (batch, heads, one, size), (rows, groups, length, keys_size) = q.shape, keys.shape
    if not (batch == rows == one == 1 and size == keys_size and heads % groups == 0):
        raise ValueError(
            f"q is {tuple(q.shape)} and keys are {tuple(keys.shape)}, expected [1, heads, 1, size] and "
            "[1, groups, length, size], heads a multiple of groups"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"keys are {keys.dtype}, values {values.dtype}, q {q.dtype}")
    if mask is not None and not (mask.shape == (1, 1, 1, length) and mask.dtype == torch.bool):
        raise ValueError(f"mask does not fit, expected bool {(1, 1, 1, length)}")


def check_decision(terms: int, per_term: Tensor, decision: str, drop: int, indicator: str) -> None:
    """Raise ValueError unless the arguments that pick the active set of so many terms fit together."""
    if per_term.shape != (terms,) or per_term.dtype != torch.float32:
        raise ValueError(
            f"thresholds or weights are {per_term.dtype} {tuple(per_term.shape)}, expected float32 {(terms,)}"
        )
    if decision not in ("threshold", "topk"):
        raise ValueError(f"decision is '{decision}', expected 'threshold' or 'topk'")
    if not 0 <= drop <= terms:
        raise ValueError(f"drop is {drop}, expected 0 ≤ drop ≤ {terms}")
    get_indicator(indicator)


def check_proxy(x: Tensor, weights: list[Tensor], proxy: list[Tensor] | None, indicator: str) -> None:
    """Raise ValueError unless there is a proxy for indicator `proxy`, one that fits, and none for others."""
    wanted = indicator == "proxy"
    if (proxy is not None) != wanted:
        raise ValueError(f"proxy is {'not ' if wanted else ''}given, and indicator is '{indicator}'")
    if proxy is None:
        return
    if len(proxy) != 4:
        raise ValueError(f"proxy has {len(proxy)} tensors, expected levels and scales of gate and of up")
    h, d = weights[0].shape
    for levels, scales in (proxy[:2], proxy[2:]):
        dtypes = (levels.dtype, scales.dtype)
        shapes = _proxy_shapes(h, d, tiles=are_tiles(levels))
        if (levels.shape, scales.shape) not in shapes or dtypes != (torch.uint8, torch.float16):
            raise ValueError(
                f"proxy is {levels.dtype} {tuple(levels.shape)} and {scales.dtype} {tuple(scales.shape)}, which does "
                f"not fit W_gate {(h, d)}"
            )
    if proxy[0].shape != proxy[2].shape:
        raise ValueError(f"proxy has levels {tuple(proxy[0].shape)} of gate and {tuple(proxy[2].shape)} of up")


def _proxy_shapes(h: int, d: int, *, tiles: bool) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes that levels and scales may have: of tiles, or of rows of each number of bits."""
    if tiles:
        return [tile_shapes(*_row_shapes(h, d, 4))]
    return [_row_shapes(h, d, bits) for bits in BITS]


def _row_shapes(h: int, d: int, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    width = padded(d, bits)
    return (h, bits * width // 8), (h, width // group_of(d, bits))


def check_counters(counters: Tensor) -> None:
    """Raise ValueError unless `counters` can count tokens and active neurons."""
    if counters.shape != (2,) or counters.dtype != torch.int64 or not counters.is_contiguous():
        raise ValueError(f"counters is {counters.dtype} {tuple(counters.shape)}, expected contiguous int64 (2,)")


def check_active(x: Tensor, weights: list[Tensor], active: Tensor) -> None:
    """Raise ValueError unless `active` gives each token of x a set of neurons."""
    shape = (*x.shape[:-1], weights[0].shape[0])
    if active.shape != shape or active.dtype != torch.bool:
        raise ValueError(f"active is {active.dtype} {tuple(active.shape)}, expected bool {shape}")


@torch.library.register_fake("countdown::sparse_ffn", lib=LIBRARY)
def _sparse_ffn(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    counters: Tensor,
    *,
    proxy: list[Tensor] | None = None,
    decision: str,
    drop: int,
    indicator: str,
    activation: str,
    weight_format: str = "plain",
) -> Tensor:
    check_ffn(x, weights, biases, activation, weight_format)
    check_proxy(x, weights, proxy, indicator)
    check_decision(weights[0].shape[0], per_neuron, decision, drop, indicator)
    check_counters(counters)
    return x.new_empty(x.shape)


@torch.library.register_fake("countdown::select", lib=LIBRARY)
def _select(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    per_neuron: Tensor,
    *,
    proxy: list[Tensor] | None = None,
    decision: str,
    drop: int,
    indicator: str,
    activation: str,
    weight_format: str = "plain",
) -> Tensor:
    check_ffn(x, weights, biases, activation, weight_format)
    check_proxy(x, weights, proxy, indicator)
    check_decision(weights[0].shape[0], per_neuron, decision, drop, indicator)
    return x.new_empty((*x.shape[:-1], weights[0].shape[0]), dtype=torch.bool)


@torch.library.register_fake("countdown::given_ffn", lib=LIBRARY)
def _given_ffn(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    active: Tensor,
    *,
    activation: str,
    weight_format: str = "plain",
) -> Tensor:
    check_ffn(x, weights, biases, activation, weight_format)
    check_active(x, weights, active)
    return x.new_empty(x.shape)


@torch.library.register_fake("countdown::sparse_linear", lib=LIBRARY)
def _sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    per_channel: Tensor,
    counters: Tensor,
    *,
    decision: str,
    drop: int,
    indicator: str,
    weight_format: str = "plain",
) -> Tensor:
    check_linear(x, weight, bias, weight_format)
    check_decision(x.shape[-1], per_channel, decision, drop, indicator)
    check_counters(counters)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("countdown::project_one", lib=LIBRARY)
def _project_one(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    check_projections(x, weights, biases)
    return x.new_empty((1, sum(len(weight) for weight in weights)))


@torch.library.register_fake("countdown::attend_one", lib=LIBRARY)
def _attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    check_attention(q, keys, values, mask)
    return q.new_empty(q.shape)
