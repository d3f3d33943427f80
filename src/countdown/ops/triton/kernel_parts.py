"""Pieces that the kernels share. An argument that may be missing is None then, which costs no instruction."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from countdown import phase as phases_of

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GENERATED = tl.constexpr(phases_of.GENERATED)
PROMPT = tl.constexpr(phases_of.PROMPT)
PADDING = tl.constexpr(phases_of.PADDING)


# Programmatic dependent launch (Hopper and later): a kernel may start while the one before it runs, once all of its
# programs have let it.


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(PDL: tl.constexpr):
    """Wait for what kernels before this one write. Before it only what no kernel of a step writes may be read."""
    if PDL:
        gdc_wait()


@triton.jit
def start_small(OVERLAP: tl.constexpr, PDL: tl.constexpr):
    """For small kernels: what comes next may come before this one waits, if it is OVERLAP.

    Many short programs fetch what they can meanwhile, wherever there is room. Programs that live as long as their
    kernel must not: where some multiprocessors are still taken, the others would get more than their share.
    """
    if OVERLAP:
        let_next_start(PDL)
    wait_for_last(PDL)
    if not OVERLAP:
        let_next_start(PDL)


@triton.jit
def begin(PDL: tl.constexpr):
    """For kernels that have nothing to fetch before they wait: what comes next would wait in their place."""
    wait_for_last(PDL)
    let_next_start(PDL)


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
    # In float32 where dtypes differ, and in the interpreter, whose dot takes bfloat16 for integers.
    if _INTERPRETED or a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dots(w, xs):
    """Rows of w [rows, D] times each of one or two tokens xs, [D] each: as many vectors [rows]."""
    if len(xs) == 1:
        z = (tl.sum(w * xs[0][None, :], 1),)
    else:
        tl.static_assert(len(xs) == 2)
        # Together: a sum across warps waits for all of them.
        z = tl.split(tl.sum(tl.join(w * xs[0][None, :], w * xs[1][None, :]), 1))
    return z


@triton.jit
def rounded(v, like):
    # As the dense FFN rounds its projections, so that active sets are those of the reference.
    return v.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def load(weight, i, c, mask):
    """A block of a weight, see `loaders`."""
    return weight[0](weight, i, c, mask)


@triton.jit
def load_rows(weight, i, c, mask):
    """A block of a weight, float32."""
    return load(weight, i, c, mask).to(tl.float32)


@triton.jit
def load_tokens(x, x_stride, c, inside, T: tl.constexpr):
    """The tokens of x [T, d], each float32 [D]."""
    xs = ()
    for t in tl.static_range(T):
        xs = xs + (tl.load(x + t * x_stride + c, mask=inside, other=0.0).to(tl.float32),)
    return xs


@triton.jit
def add_bias(v, b, i, mask):
    if b is not None:
        v += tl.load(b + i, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def is_above(v, threshold):
    # NaN compares false, and is above every threshold.
    return ~(tl.abs(v) <= threshold)


@triton.jit
def factor(z, like, GATE_FIRST: tl.constexpr, ACT: tl.constexpr):
    """The factor of the coefficient that projections z are, rounded as the dense FFN rounds."""
    v = rounded(z, like)
    if GATE_FIRST:
        v = rounded(activate(v, ACT), like)
    return v


@triton.jit
def is_active(v, z, threshold):
    # Of an input that is not finite, no projection z is: every neuron is active then.
    return is_above(v, threshold) | ~(tl.abs(z) < float("inf"))


@triton.jit
def in_phase(active, phase):
    return (active | (phase == PROMPT)) & (phase != PADDING)


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


@triton.jit
def count(counters, tokens, active):
    # Integers: the sum is the same in whatever order programs add.
    tl.atomic_add(counters, tokens.to(tl.int64), mask=tl.program_id(0) == 0, sem="relaxed")
    count_more(counters + 1, active)


@triton.jit
def count_more(counter, number):
    tl.atomic_add(counter, number.to(tl.int64), sem="relaxed")
