"""Kernels of the sparse FFN. Letters as in `ops.call`: T tokens, d hidden size, h neurons.

One token or two: a program decides on its own rows, keeps the active ones in registers and goes straight on to their
rows of the matrices that are left: no list of active neurons in memory, no second launch. A row is read once for both
tokens. More tokens: rows are read once for all, by tiles, those that no token needs masked out. Either way a program
leaves a partial sum of its own and `reduce` adds them in a fixed order, so the same call gives the same bits.

A second look is at whole coefficients, by thresholds `second`: what remains of the first one computes the other factor,
and what that leaves goes on to W_down. The same two ways: a list in registers, made anew, and tiles.

What decides is a function of `deciders`, how a row is read one of `loaders`; kernels are compiled for each combination
and name none. `first` is the weight that decides where one does, else up; `other` is the other of gate and up. Rows are
W_gate[i], W_up[i] and W_down[:, i]. Loads that are used once are marked to leave the cache first; partial sums are
marked to stay in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from countdown.ops.triton.deciders import load_levels, products_of_levels, quantised
from countdown.ops.triton.kernel_parts import (
    GENERATED,
    PADDING,
    activate,
    add_bias,
    begin,
    count,
    count_more,
    dot,
    dots,
    factor,
    in_phase,
    is_active,
    is_inside,
    load,
    load_rows,
    load_tokens,
    pick,
    rounded,
)


@triton.jit
def _over_rows(
    kept, by, first, tokens, like, phases, to, h, c, inside,
    DECIDE: tl.constexpr, KEEP: tl.constexpr, HOW: tl.constexpr, ACT: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Decide on this program's rows, block by block, and keep what is active, in registers or in `to`.

    Program p takes blocks of ROWS rows, p, p + P, ...: neighbours read neighbouring memory at about the same time.
    """
    phase = ()
    if phases is not None:
        for t in tl.static_range(T):
            phase = phase + (tl.load(phases + t),)
    for start in tl.range(tl.program_id(0) * ROWS, h, tl.num_programs(0) * ROWS, num_stages=STAGES):
        i = start + tl.arange(0, ROWS)
        here = i < h
        found, values = DECIDE(by, first, tokens, like, i, here, c, inside, HOW, ACT)
        active = ()
        for t in tl.static_range(T):
            one = found[t]
            if phases is not None:
                one = in_phase(one, phase[t])
            active = active + (here & one,)
        kept = KEEP(kept, active, values, phase, i, here, to, h)
    return kept, phase


@triton.jit
def _one_if_generated(phase, t: tl.constexpr):
    if len(phase) == 0:
        one = tl.full([], 1, tl.int32)
    else:
        one = (phase[t] == GENERATED).to(tl.int32)
    return one


# Keeping: in registers, for `_gather_and_sum`, or in memory.


@triton.jit
def _none_in_registers(MINE: tl.constexpr, T: tl.constexpr, KNOWN: tl.constexpr):
    """A list for MINE rows: entries, how many, and what is known of their coefficients for each token, if anything."""
    values = ()
    if KNOWN:
        for _ in tl.static_range(T):
            values = values + (tl.zeros([MINE], tl.float32),)
    return tl.zeros([MINE], tl.int32), tl.full([], 0, tl.int32), values


@triton.jit
def _in_registers(kept, active, values, phase, i, here, to, h):
    """Append the rows that some token needs, and what is known of them."""
    index, n, known = kept
    needed = active[0]
    entry = i
    if len(active) == 2:
        bits = active[0].to(tl.int32) | (active[1].to(tl.int32) << 1)
        needed = bits != 0
        entry = (i << 2) | bits
    if len(known) == 0:
        index, n, where = _appended(index, n, entry, needed)
    else:
        # At 80% two blocks of five have none, of four rows each.
        if tl.sum(needed.to(tl.int32), 0) > 0:
            index, n, where = _appended(index, n, entry, needed)
            more = ()
            for t in tl.static_range(len(active)):
                more = more + (known[t] + tl.sum(tl.where(where, values[t][:, None], 0.0), 0),)
            known = more
    return index, n, known


# An entry is a row, with two tokens in its higher bits: which of the two needs it stands in the lowest.


@triton.jit
def _row_of(entry, T: tl.constexpr):
    if T == 2:
        entry = entry >> 2
    return entry


@triton.jit
def _is_needed(entry, t: tl.constexpr, T: tl.constexpr):
    if T == 2:
        needed = ((entry >> t) & 1) != 0
    else:
        needed = tl.full(entry.shape, True, tl.int1)
    return needed


@triton.jit
def _appended(index, n, entry, needed):
    # Also says which went where.
    k = tl.arange(0, index.shape[0])
    one = needed.to(tl.int32)
    position = n + tl.cumsum(one, 0) - one
    where = needed[:, None] & (position[:, None] == k[None, :])
    index += tl.sum(tl.where(where, entry[:, None], 0), 0)
    return index, n + tl.sum(one, 0), where


@triton.jit
def _in_memory(kept, active, values, phase, i, here, to, h):
    """Write active sets [T, h] int8, and count those of generated tokens."""
    for t in tl.static_range(len(active)):
        tl.store(to + t * h + i, active[t].to(tl.int8), mask=here)
        kept += tl.sum(active[t].to(tl.int32), 0) * _one_if_generated(phase, t)
    return kept


@triton.jit
def decide_and_sum(
    x, x_stride, by, first, other, down, biases, second, phases, partial, counters, h, d: tl.constexpr,
    READ: tl.constexpr, DECIDE: tl.constexpr, HOW: tl.constexpr, KNOWN: tl.constexpr, GATE_FIRST: tl.constexpr,
    ACT: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr,
    MINE: tl.constexpr, STAGES: tl.constexpr, GATHER_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token or two: Σ over the active neurons of this program's rows.

    x [T, d] → partial [P, T, d] float32; counters += (generated tokens, their active neurons). KNOWN: what decides
    finds one of the two factors. second: thresholds [h] of a second look, or None; then counters += what that leaves,
    too. D ≥ d and MINE ≥ a program's rows are powers of two.
    """
    c = tl.arange(0, D)
    inside = is_inside(c, d, D)
    begin(PDL)
    xs = load_tokens(x, x_stride, c, inside, T)
    tokens = READ(x, x_stride, xs, d, HOW, T)
    kept, phase = _over_rows(
        _none_in_registers(MINE, T, KNOWN), by, first, tokens, x, phases, None, h, c, inside,
        DECIDE, _in_registers, HOW, ACT, T, ROWS, STAGES,
    )  # fmt: skip
    if counters is not None:
        tokens_counted, active = _counted(kept, phase, T)
        count(counters, tokens_counted, active)
    if second is None:
        ys = _gather_and_sum(
            xs, first, other, down, biases, kept, c, inside, KNOWN, GATE_FIRST, ACT, GATHER, GATHER_STAGES
        )
    else:
        kept = _look_again(
            xs, x, other, biases[1], second, kept, phase, c, inside, GATE_FIRST, ACT, GATHER, GATHER_STAGES
        )
        if counters is not None:
            _, active = _counted(kept, phase, T)
            count_more(counters + 2, active)
        ys = _sum_known(xs, down, kept, c, inside, GATHER, GATHER_STAGES)
    _leave(partial, ys, c, inside, d)


@triton.jit
def _counted(kept, phase, T: tl.constexpr):
    """How many tokens are counted, and how many neurons of a list these need."""
    index, n, _ = kept
    tokens = _one_if_generated(phase, 0)
    if T == 1:
        active = n * tokens
    else:
        active = tl.sum(index & 1, 0) * tokens
        tokens += _one_if_generated(phase, 1)
        active += tl.sum((index >> 1) & 1, 0) * _one_if_generated(phase, 1)
    return tokens, active


@triton.jit
def _look_again(
    xs, like, other, bias, second, kept, phase, c, inside,
    GATE_FIRST: tl.constexpr, ACT: tl.constexpr, GATHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of neurons kept in registers with one factor, those whose coefficient some token needs, with that."""
    index, n, values = kept
    k = tl.arange(0, index.shape[0])
    left = _none_in_registers(index.shape[0], len(xs), True)
    for start in tl.range(0, n, GATHER, num_stages=STAGES):
        o = start + tl.arange(0, GATHER)
        here = o < n
        entry = pick(index, k, o)
        i = _row_of(entry, len(xs))
        z = dots(load_rows(other, i, c, here[:, None] & inside[None, :]), xs)
        threshold = tl.load(second + i, mask=here, other=0.0)
        active = ()
        coefficients = ()
        for t in tl.static_range(len(xs)):
            zt = add_bias(z[t], bias, i, here)
            s = pick(values[t], k, o) * factor(zt, like, not GATE_FIRST, ACT)
            above = is_active(s, zt, threshold)
            if len(phase) != 0:
                above = in_phase(above, phase[t])
            above = above & here & _is_needed(entry, t, len(xs))
            active = active + (above,)
            coefficients = coefficients + (tl.where(above, s, 0.0),)
        left = _in_registers(left, active, coefficients, phase, i, here, None, None)
    return left


@triton.jit
def _sum_known(xs, down, kept, c, inside, GATHER: tl.constexpr, STAGES: tl.constexpr):
    """Σ over the neurons that are kept in registers with their coefficients, float32 [D] for each token."""
    index, n, coefficients = kept
    k = tl.arange(0, index.shape[0])
    ys = ()
    for _ in tl.static_range(len(xs)):
        ys = ys + (tl.zeros(c.shape, tl.float32),)
    for start in tl.range(0, n, GATHER, num_stages=STAGES):
        o = start + tl.arange(0, GATHER)
        i = _row_of(pick(index, k, o), len(xs))
        column = load_rows(down, i, c, (o < n)[:, None] & inside[None, :])
        sums = ()
        for t in tl.static_range(len(xs)):
            sums = sums + (ys[t] + tl.sum(column * pick(coefficients[t], k, o)[:, None], 0),)
        ys = sums
    return ys


@triton.jit
def _gather_and_sum(
    xs, first, other, down, biases, kept, c, inside,
    KNOWN: tl.constexpr, GATE_FIRST: tl.constexpr, ACT: tl.constexpr, GATHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ over the neurons that are kept in registers, float32 [D] for each token."""
    index, n, values = kept
    k = tl.arange(0, index.shape[0])
    ys = ()
    for _ in tl.static_range(len(xs)):
        ys = ys + (tl.zeros(c.shape, tl.float32),)
    for start in tl.range(0, n, GATHER, num_stages=STAGES):
        o = start + tl.arange(0, GATHER)
        here = o < n
        entry = pick(index, k, o)
        i = _row_of(entry, len(xs))
        mask = here[:, None] & inside[None, :]
        if not KNOWN:
            wf = load_rows(first, i, c, mask)
        wo = load_rows(other, i, c, mask)
        column = load_rows(down, i, c, mask)
        if not KNOWN:
            own = _factors(wf, xs, biases[0], i, here, "")
        factors = _factors(wo, xs, biases[1], i, here, "" if GATE_FIRST else ACT)
        sums = ()
        for t in tl.static_range(len(xs)):
            v = pick(values[t], k, o) if KNOWN else own[t]
            s = tl.where(here & _is_needed(entry, t, len(xs)), factors[t] * v, 0.0)
            sums = sums + (ys[t] + tl.sum(column * s[:, None], 0),)
        ys = sums
    return ys


@triton.jit
def _factors(w, xs, bias, i, here, ACT: tl.constexpr):
    """The projections of each token by rows w, [rows, D], of a weight; with an activation where there is one."""
    z = dots(w, xs)
    factors = ()
    for t in tl.static_range(len(xs)):
        v = add_bias(z[t], bias, i, here)
        if ACT != "":
            v = activate(v, ACT)
        factors = factors + (v,)
    return factors


@triton.jit
def _leave(partial, ys, c, inside, d: tl.constexpr):
    place = tl.program_id(0) * len(ys)
    for t in tl.static_range(len(ys)):
        tl.store(partial + (place + t) * d + c, ys[t], mask=inside, eviction_policy="evict_last")


@triton.jit
def select_rows(
    x, x_stride, by, phases, active_set, counters, h, d,
    READ: tl.constexpr, DECIDE: tl.constexpr, HOW: tl.constexpr, ACT: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Which neurons of this program's rows each of T tokens needs: active_set [T, h] int8, and counters if given.

    Tokens stay in registers, so that a row is read once for all. For what decides without x in floats.
    """
    begin(PDL)
    tokens = READ(x, x_stride, (), d, HOW, T)
    active, phase = _over_rows(
        tl.full([], 0, tl.int32), by, None, tokens, None, phases, active_set, h, None, None,
        DECIDE, _in_memory, HOW, ACT, T, ROWS, STAGES,
    )  # fmt: skip
    if counters is not None:
        generated = _one_if_generated(phase, 0)
        for t in tl.static_range(1, T):
            generated += _one_if_generated(phase, t)
        count(counters, generated, active)


@triton.jit
def sum_listed(
    x, first, other, down, biases, listed, listed_count, partial, h, d: tl.constexpr,
    ACT: tl.constexpr, D: tl.constexpr, GATHER: tl.constexpr, MINE: tl.constexpr, GATHER_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token: Σ over listed neurons, of which program p takes every P-th.

    x [d], listed [h] int32 of which the first `listed_count[0]` hold → partial [P, d] float32.
    """
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    c = tl.arange(0, D)
    inside = is_inside(c, d, D)
    k = tl.arange(0, MINE)
    begin(PDL)
    # Not masked by the count, so that both loads are under way at once.
    index = tl.load(listed + p + k * programs, mask=p + k * programs < h, other=0)
    n = (tl.load(listed_count) - p + programs - 1) // programs
    xs = load_tokens(x, d, c, inside, 1)
    ys = _gather_and_sum(
        xs, first, other, down, biases, (index, n, ()), c, inside, False, False, ACT, GATHER, GATHER_STAGES
    )
    _leave(partial, ys, c, inside, d)


@triton.jit
def list_active(active, listed, listed_count, counters, h, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """active [h] → listed [h] int32, its neurons in order, and listed_count [1]. One program, which counts too."""
    begin(PDL)
    n = 0
    for start in range(0, h, BLOCK):
        i = start + tl.arange(0, BLOCK)
        one = (tl.load(active + i, mask=i < h, other=0) != 0).to(tl.int32)
        tl.store(listed + n + tl.cumsum(one, 0) - one, i, mask=one != 0)
        n += tl.sum(one, 0)
    tl.store(listed_count, n)
    if counters is not None:
        count(counters, tl.full([], 1, tl.int32), n)


@triton.jit
def _project(x, weight, bias, i, here, tokens, d, x_stride, BLOCK: tl.constexpr, T: tl.constexpr,
             STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Rows i of W x + b for all tokens, float32 [rows, T]."""
    t = tl.arange(0, T)
    acc = tl.zeros([i.shape[0], T], tl.float32)
    for start in tl.range(0, d, BLOCK, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK)
        inside = c < d
        wv = load(weight, i, c, here[:, None] & inside[None, :])
        xv = tl.load(x + t[:, None] * x_stride + c[None, :], mask=(t < tokens)[:, None] & inside[None, :], other=0.0)
        acc = dot(wv, tl.trans(xv), acc, PRECISION)
    return add_bias(acc, bias, i[:, None], here[:, None])


@triton.jit
def coefficients(
    x, x_stride, first, other, biases, per_neuron, second, phases, active_set, s, needs, counters, tokens, d, h,
    GATE_FIRST: tl.constexpr, ACT: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: coefficients of each token's active neurons, 0 elsewhere, for this program's rows.

    x [tokens, d] → s [h, T] in the dtype of x; needs [h] int8, whether any token needs a neuron. Without thresholds
    per_neuron, active_set [tokens, h] int8 says what is active. Else `first` and they do, and where there are counters,
    those += (generated tokens, their active neurons). second: see `decide_and_sum`. Without s, active_set is written,
    and no more.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = i < h
    t = tl.arange(0, T)
    place = t[None, :] * h + i[:, None]
    valid = here[:, None] & (t < tokens)[None, :]
    begin(PDL)
    if per_neuron is None:
        active = tl.load(active_set + place, mask=valid, other=0) != 0
        read = tl.sum(active.to(tl.int32), 1) > 0
    else:
        read = here
    z = _project(x, first, biases[0], i, read, tokens, d, x_stride, BLOCK, T, STAGES, PRECISION)
    v = factor(z, x, GATE_FIRST, ACT)
    phase = _phases_of(phases, t, tokens)[None, :]
    if per_neuron is not None:
        active = is_active(v, z, tl.load(per_neuron + i, mask=here, other=0.0)[:, None])
        active = here[:, None] & in_phase(active, phase)
    left = active
    if s is None:
        tl.store(active_set + place, active.to(tl.int8), mask=valid)
    else:
        needed = tl.sum(active.to(tl.int32), 1) > 0
        z = _project(x, other, biases[1], i, needed, tokens, d, x_stride, BLOCK, T, STAGES, PRECISION)
        w = _other_factor(z, x, second, GATE_FIRST, ACT)
        if second is not None:
            above = is_active(v * w, z, tl.load(second + i, mask=here, other=0.0)[:, None])
            left = active & in_phase(above, phase)
        product = tl.where(left, v * w, 0.0)
        tl.store(s + i[:, None] * T + t[None, :], product.to(s.dtype.element_ty), mask=here[:, None])
        tl.store(needs + i, (tl.sum(left.to(tl.int32), 1) > 0).to(tl.int8), mask=here)
    if counters is not None:
        generated = phase == GENERATED
        count(counters, tl.sum(tl.sum(generated.to(tl.int32), 1), 0), _sum_of(active & generated))
        if second is not None:
            count_more(counters + 2, _sum_of(left & generated))


@triton.jit
def _phases_of(phases, t, tokens):
    """Of each token of a tile; those beyond the last are padding."""
    if phases is None:
        phase = tl.where(t < tokens, GENERATED, PADDING)
    else:
        phase = tl.load(phases + t, mask=t < tokens, other=PADDING)
    return phase


@triton.jit
def _other_factor(w, like, second, GATE_FIRST: tl.constexpr, ACT: tl.constexpr):
    # As the dense FFN rounds it where it decides.
    if second is not None:
        w = factor(w, like, not GATE_FIRST, ACT)
    elif not GATE_FIRST:
        w = activate(rounded(w, like), ACT)
    return w


@triton.jit
def _sum_of(flags):
    return tl.sum(tl.sum(flags.to(tl.int32), 1), 0)


@triton.jit
def sum_columns(
    s, needs, down, partial, tokens, d, h, per_program,
    T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: Σ s_i w_i over this program's neurons and columns.

    s [h, T], needs [h] int8: the neurons that some token needs → partial [P, tokens, d] float32.
    """
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.program_id(1)
    t = tl.arange(0, T)
    y = tl.zeros([T, COLUMNS], tl.float32)
    begin(PDL)
    stop = tl.minimum((p + 1) * per_program, h)
    for start in tl.range(p * per_program, stop, ROWS, num_stages=STAGES):
        i = start + tl.arange(0, ROWS)
        needed = tl.load(needs + i, mask=i < stop, other=0) != 0
        sv = tl.load(s + i[:, None] * T + t[None, :], mask=(i < stop)[:, None], other=0.0)
        wv = load(down, i, c, needed[:, None] & (c < d)[None, :])
        y = dot(tl.trans(sv), wv, y, PRECISION)
    to = partial + (p * tokens + t[:, None]) * d + c[None, :]
    tl.store(to, y, mask=(t < tokens)[:, None] & (c < d)[None, :], eviction_policy="evict_last")


@triton.jit
def reduce(
    partial, down_bias, y, predicted, phases, programs, tokens, d,
    P: tl.constexpr, COLUMNS: tl.constexpr, HOW: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial [programs, tokens, d] → y [tokens, d], added in order.

    predicted: None, or what is added to sparse tokens, see `compensation.affine`: levels and scales of L, channels [d],
    b [d], and the tokens x with their stride. Rows of L are fetched before this waits; EARLY: all is computed then, as
    the kernel before does not let this start before x is there. HOW: see `deciders.quantised`.
    """
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1)
    p = tl.arange(0, P)
    here = c < d
    if predicted is not None:
        rows = load_levels((predicted[0], predicted[1]), c, here, HOW)
        if EARLY:
            z = _predicted(rows, predicted, phases, c, t, here, d, HOW)
            begin(PDL)
        else:
            begin(PDL)
            z = _predicted(rows, predicted, phases, c, t, here, d, HOW)
    else:
        begin(PDL)
    v = tl.load(
        partial + (p[:, None] * tokens + t) * d + c[None, :],
        mask=(p < programs)[:, None] & here[None, :], other=0.0, eviction_policy="evict_last",
    )  # fmt: skip
    total = add_bias(tl.sum(v, 0), down_bias, c, here)
    if predicted is not None:
        total += z
    tl.store(y + t * d + c, total.to(y.dtype.element_ty), mask=here)


@triton.jit
def _predicted(rows, predicted, phases, c, t, here, d, HOW: tl.constexpr):
    """What is added to token t in columns c, from these rows of L; 0 if it is not sparse."""
    _, _, channels, bias, x, x_stride = predicted
    token = quantised(x + t * x_stride, channels, d, HOW)
    z = tl.sum(products_of_levels(rows, token, HOW), 1) * token[3] + tl.load(bias + c, mask=here, other=0.0)
    # Of a token that is not finite the step is not.
    sparse = tl.abs(token[3]) < float("inf")
    if phases is not None:
        sparse = sparse & (tl.load(phases + t) == GENERATED)
    return tl.where(sparse, z, 0.0)
