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
def dot(a, b, acc):
    if _INTERPRETED:  # its dot takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(v, like):
    # As the dense FFN rounds its projections, so that active sets are those of the reference.
    return v.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def load_rows(w, i, stride, c, mask):
    offsets = i[:, None].to(tl.int64) * stride + c[None, :]
    return tl.load(w + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


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
def pick(v, k, o):
    # v[o] of a vector in registers, k = 0, 1, ...
    return tl.sum(tl.where(k[None, :] == o[:, None], v[None, :], 0), 1)
