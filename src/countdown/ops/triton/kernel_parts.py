"""Pieces that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def begin(PDL: tl.constexpr):
    # Programmatic dependent launch (Hopper and later): start while the kernel before ends, and wait for its results.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def activate(g, ACT: tl.constexpr):
    if ACT == "silu":
        a = g * tl.sigmoid(g)
    elif ACT == "gelu_tanh":
        # (1 + tanh z) / 2 is sigmoid(2z).
        a = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif ACT == "gelu":
        a = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "relu")
        a = tl.where(g <= 0, 0.0, g)  # NaN stays
    return a


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:  # its dot takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(v, like):
    # As the dense FFN rounds its projections, so that active sets are those of the reference.
    return v.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def load_rows(w, i, stride, c, mask):
    offsets = i[:, None].to(tl.int64) * stride + c[None, :]
    return tl.load(w + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def is_above(v, threshold):
    # NaN compares false, and is above every threshold.
    return ~(tl.abs(v) <= threshold)


@triton.jit
def load_bias(b, i, mask, HAS: tl.constexpr):
    v = tl.zeros(i.shape, tl.float32)
    if HAS:
        v = tl.load(b + i, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def is_inside(c, d: tl.constexpr, D: tl.constexpr):
    # A mask that is known to hold costs nothing.
    if d == D:
        inside = tl.full([D], True, tl.int1)
    else:
        inside = c < d
    return inside


@triton.jit
def exists(t: tl.constexpr, tokens):
    # Not `t < tokens`, which is no tensor in Triton's interpreter.
    return tl.full([1], t, tl.int32) < tokens


@triton.jit
def pick(v, k, o):
    # v[o] of a vector in registers, k = 0, 1, ...
    return tl.sum(tl.where(k[None, :] == o[:, None], v[None, :], 0), 1)


@triton.jit
def keep_active(index, n, i, active, k):
    # Appends the active of i to the first n of a list in registers, k = 0, 1, ...; also says which went where.
    one = active.to(tl.int32)
    position = n + tl.cumsum(one, 0) - one
    to = active[:, None] & (position[:, None] == k[None, :])
    index += tl.sum(tl.where(to, i[:, None], 0), 0)
    return index, n + tl.sum(one, 0), to


@triton.jit
def count(counters, once, tokens, active):
    # Integers: the sum is the same in whatever order programs add.
    tl.atomic_add(counters, tokens.to(tl.int64), mask=once, sem="relaxed")
    tl.atomic_add(counters + 1, active.to(tl.int64), sem="relaxed")


@triton.jit
def gather_and_sum(
    xv, gate, up, down, gate_bias, up_bias, index, k, n, gate_stride, up_stride, down_stride, c, inside,
    ACT: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, GATHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ over the first n neurons of a list in registers, float32 [D], for one token xv [D]."""
    y = tl.zeros([D], tl.float32)
    for start in tl.range(0, n, GATHER, num_stages=STAGES):
        o = start + tl.arange(0, GATHER)
        here = o < n
        i = pick(index, k, o)
        mask = here[:, None] & inside[None, :]
        wu = load_rows(up, i, up_stride, c, mask)
        wg = load_rows(gate, i, gate_stride, c, mask)
        column = load_rows(down, i, down_stride, c, mask)
        u = tl.sum(wu * xv[None, :], 1) + load_bias(up_bias, i, here, BIAS)
        g = tl.sum(wg * xv[None, :], 1) + load_bias(gate_bias, i, here, BIAS)
        s = tl.where(here, activate(g, ACT) * u, 0.0)
        y += tl.sum(column * s[:, None], 0)
    return y
