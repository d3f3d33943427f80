"""What every kernel must satisfy, on whatever device: shared by the interpreter's tests and those of the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

import oracle
from calls import REFERENCE, TRITON, Ops
from countdown.ops.cpu import library
from countdown.phase import GENERATED, PADDING, PROMPT
from countdown.weights import Plain, Weight
from countdown.weights.symmetric import Symmetric, quantise, token_steps

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def tolerance(dtype: torch.dtype, ops: Ops = TRITON) -> float:
    """Return the relative error that is allowed; Triton's interpreter truncates to bfloat16, where devices round."""
    interpreted = ops is TRITON and not torch.cuda.is_available()
    return 2e-2 if interpreted and dtype == torch.bfloat16 else TOLERANCE[dtype]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated and not written with NaN, and integers with their largest value; for every call anew."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        with patch.object(library._Scratch, "of", lambda _, size: torch.empty(size, dtype=torch.uint8)):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def ffn(d: int, h: int, dtype: torch.dtype, device: str, *, bias: bool = False, seed: int = 0, form: str = "split"):
    """Random weights and biases with W_down laid out by neuron; gate and up `split`, or rows of one matrix, one after
    the other (`fused`) or in turn (`interleaved`)."""
    weights, biases = oracle.random_ffn(d, h, dtype, bias=bias, seed=seed)
    gate, up, down = (weight.to(device) for weight in weights)
    biases = [None if b is None else b.to(device) for b in biases]
    if form == "fused":
        both = torch.cat([gate, up])
        gate, up = both[:h], both[h:]
    if form == "interleaved":
        both = torch.stack([gate, up], dim=1).view(2 * h, d)
        gate, up = both[::2], both[1::2]
        if bias:
            both = torch.stack(biases[:2], dim=1).view(2 * h)
            biases = [both[::2], both[1::2], biases[2]]
    return [gate, up, down.t().contiguous().t()], biases


def on_cpu(tensors: list[Tensor | None]) -> list:
    return [None if tensor is None else tensor.cpu() for tensor in tensors]


def inputs(tokens: int, d: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(1000 + seed)).to(dtype).to(device)


def clear_thresholds(indicator: Tensor, share: float) -> Tensor:
    """Return thresholds [h], float32, far from every indicator [T, h]; about `share` of the first token's lie below."""
    if share == 0:
        return torch.full((indicator.shape[1],), -1.0)
    sizes = indicator.abs().double()
    ordered = torch.cat([torch.zeros(1, len(sizes[0])).double(), sizes.sort(dim=0).values, 2 * sizes.amax(0)[None] + 1])
    low, high = ordered[:-1], ordered[1:]
    dropped = sizes[0] <= sizes[0].quantile(share)
    allowed = torch.where(dropped, high > sizes[0], high <= sizes[0])
    # The widest gap between neighbours, above or below the first token's: relative to them, for what is rounded to a
    # few bits, and to all, for what is left of a sum that cancels.
    gap = torch.where(allowed, (high - low) / (high + low + 0.1 * sizes.mean()), -1.0).argmax(dim=0, keepdim=True)
    return ((low.gather(0, gap) + high.gather(0, gap)) / 2)[0].float()


def check_sparse(
    tokens: int, d: int, h: int, dtype: torch.dtype, device: str, *, indicator: str, activation: str, share: float,
    bias: bool = False, form: str = "split", seed: int = 0, ops: Ops = TRITON,
) -> None:  # fmt: skip
    """`sparse_ffn` against float64: values, counters, and the same from `select` and `given_ffn`."""
    weights, biases = ffn(d, h, dtype, device, bias=bias, seed=seed, form=form)
    x = inputs(tokens, d, dtype, device, seed)
    cpu_weights, cpu_biases = on_cpu(weights), on_cpu(biases)
    a, u = oracle.projections(x.cpu(), cpu_weights, cpu_biases, activation)
    value = {"up": u, "gate": a, "coefficient": a * u}[indicator]
    thresholds = clear_thresholds(value, share)
    expected_active = ~(value.abs() <= thresholds.double())
    expected = oracle.combine(a, u, expected_active, cpu_weights, cpu_biases)
    counters = torch.tensor([3, 5], device=device)
    how = {"decision": "threshold", "drop": int(share * h), "indicator": indicator, "activation": activation}
    per_neuron = thresholds.to(device)
    with poisoned():
        y = ops.sparse_ffn(x, weights, biases, per_neuron, counters, **how)
        active = ops.select(x, weights, biases, per_neuron, **how)
        also = torch.tensor([7, 9], device=device)
        given = ops.given_ffn(x, weights, biases, expected_active.to(device), activation=activation, counters=also)
    assert also.tolist() == [7 + tokens, 9 + int(expected_active.sum())]
    # fp16 and bf16 may round an indicator across a threshold that lies within half a step of it.
    steps = (active.cpu() != expected_active).sum().item()
    assert steps <= (0 if dtype == torch.float32 else 0.02 * tokens * h + 1)
    if steps == 0:
        assert counters.tolist() == [3 + tokens, 5 + int(expected_active.sum())]
        assert oracle.relative_error(y.cpu(), expected) <= tolerance(dtype, ops)
    own = oracle.combine(a, u, active.cpu(), cpu_weights, cpu_biases)
    assert oracle.relative_error(y.cpu(), own) <= 3 * tolerance(dtype, ops)
    assert oracle.relative_error(given.cpu(), expected) <= tolerance(dtype, ops)


def check_second_look(
    tokens: int, d: int, h: int, dtype: torch.dtype, device: str, *, indicator: str, activation: str,
    shares: tuple[float, float], bias: bool = False, form: str = "split", seed: int = 0, phases: Tensor | None = None,
    ops: Ops = TRITON,
) -> None:  # fmt: skip
    """`sparse_ffn` by two looks against float64: values, and counters of both.

    shares: Of the first token's neurons, about how many each look leaves out of all.
    """
    weights, biases = ffn(d, h, dtype, device, bias=bias, seed=seed, form=form)
    x = inputs(tokens, d, dtype, device, seed)
    cpu_weights, cpu_biases = on_cpu(weights), on_cpu(biases)
    a, u = oracle.projections(x.cpu(), cpu_weights, cpu_biases, activation)
    indicators = {"up": u, "gate": a}[indicator], a * u
    thresholds = [clear_thresholds(value, share) for value, share in zip(indicators, shares, strict=True)]
    phase = torch.full((tokens,), GENERATED, dtype=torch.uint8) if phases is None else phases
    first, second = (~(v.abs() <= t.double()) for v, t in zip(indicators, thresholds, strict=True))
    active = ((first & second) | (phase == PROMPT)[:, None]) & (phase != PADDING)[:, None]
    expected = oracle.combine(a, u, active, cpu_weights, cpu_biases)
    counted = (phase == GENERATED)[:, None]
    left = (int((some & counted).sum()) for some in (first, first & second))
    wanted = torch.tensor([3 + int(counted.sum()), *left])
    counters = torch.tensor([3, 0, 0], device=device)
    how = {"decision": "threshold", "drop": int(shares[0] * h), "indicator": indicator, "activation": activation}
    how |= {"phases": None if phases is None else phases.to(device)}
    with poisoned():
        y = ops.sparse_ffn(x, weights, biases, torch.stack(thresholds).to(device), counters, **how)
    # As in `check_sparse`; a neuron at its threshold is one of the smallest.
    steps = int((counters.cpu() - wanted).abs().sum())
    assert steps <= (0 if dtype == torch.float32 else 0.04 * tokens * h + 1)
    assert oracle.relative_error(y.cpu(), expected) <= (tolerance(dtype, ops) if steps == 0 else 0.1)


def proxy_of(weights: list[Tensor], bits: int = 4) -> list[Symmetric]:
    """Gate and up in few bits, all inputs as important."""
    return [quantise(weight, torch.ones(weight.shape[1]), bits) for weight in weights[:2]]


def check_proxy(
    tokens: int, d: int, h: int, dtype: torch.dtype, device: str, *, activation: str, share: float,
    bias: bool = False, form: str = "split", seed: int = 0, ops: Ops = TRITON,
) -> None:  # fmt: skip
    """`sparse_ffn` and `select` by a 4-bit proxy against float64: active sets, values, counters."""
    weights, biases = ffn(d, h, dtype, device, bias=bias, seed=seed, form=form)
    x = inputs(tokens, d, dtype, device, seed)
    proxy = proxy_of(weights)
    cpu_weights, cpu_biases = on_cpu(weights), on_cpu(biases)
    a, u = oracle.proxy_factors(x.cpu(), proxy, cpu_biases, activation, unpacked=d * h > 10**6)
    thresholds = clear_thresholds(a * u, share)
    expected_active = ~((a * u).abs() <= thresholds.double())
    how = {"decision": "threshold", "drop": int(share * h), "indicator": "proxy-4", "activation": activation}
    per_neuron, counters = thresholds.to(device), torch.tensor([3, 5], device=device)
    with poisoned():
        y = ops.sparse_ffn(x, weights, biases, per_neuron, counters, proxy=proxy, **how)
        active = ops.select(x, weights, biases, per_neuron, proxy=proxy, **how)
    assert torch.equal(active.cpu(), expected_active)
    assert counters.tolist() == [3 + tokens, 5 + int(expected_active.sum())]
    exact = oracle.projections(x.cpu(), cpu_weights, cpu_biases, activation)
    expected = oracle.combine(*exact, expected_active, cpu_weights, cpu_biases)
    assert oracle.relative_error(y.cpu(), expected) <= tolerance(dtype, ops)


def decided(
    by: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None], share: float
) -> tuple[dict, Tensor, Tensor]:
    """Return the arguments that decide with an activation of `silu`, thresholds [h], and the active sets in float64."""
    cpu_weights, cpu_biases = on_cpu(weights), on_cpu(biases)
    how: dict = {"decision": "threshold", "drop": int(share * len(weights[0])), "indicator": by, "activation": "silu"}
    if by == "proxy-4":
        how["proxy"] = proxy_of(weights)
        a, u = oracle.proxy_factors(x.cpu(), how["proxy"], cpu_biases, "silu", unpacked=weights[0].numel() > 10**5)
    else:
        a, u = oracle.projections(x.cpu(), cpu_weights, cpu_biases, "silu")
    value = {"up": u, "gate": a}.get(by, a * u)
    thresholds = clear_thresholds(value, share)
    return how, thresholds.to(x.device), ~(value.abs() <= thresholds.double())


def check_phases(
    phases: list[int], d: int, h: int, dtype: torch.dtype, device: str, *, by: str, bias: bool = True, seed: int = 0,
    ops: Ops = TRITON,
) -> None:  # fmt: skip
    """`sparse_ffn` and `select` of tokens in these phases against float64 and the reference; padding is not finite."""
    weights, biases = ffn(d, h, dtype, device, bias=bias, seed=seed)
    x = inputs(len(phases), d, dtype, device, seed)
    how, thresholds, active = decided(by, x, weights, biases, 0.6)
    now = torch.tensor(phases, dtype=torch.uint8)
    active = (active | (now == PROMPT)[:, None]) & (now != PADDING)[:, None]
    clean = x.cpu().clone()
    x[now.to(device) == PADDING, d // 2] = torch.nan
    counters, expected_counters = (torch.tensor([3, 5], device=device) for _ in range(2))
    arguments = (x, weights, biases, thresholds)
    with poisoned():
        found = ops.select(*arguments, phases=now.to(device), **how).cpu()
        y = ops.sparse_ffn(*arguments, counters, phases=now.to(device), **how).cpu()
    # fp16 and bf16 may round an indicator across a threshold, see `check_sparse`.
    differs = found != active
    assert not differs[now != GENERATED].any()
    assert differs.sum().item() <= (0 if dtype == torch.float32 or by == "proxy-4" else 0.02 * active.numel() + 1)
    a, u = oracle.projections(clean, on_cpu(weights), on_cpu(biases), "silu")
    expected = oracle.combine(a, u, found, on_cpu(weights), on_cpu(biases))
    assert oracle.relative_error(y, expected) <= 3 * tolerance(dtype, ops)
    alone = torch.zeros(d, dtype=dtype) if biases[2] is None else biases[2].cpu()
    assert torch.equal(y[now == PADDING], alone.expand(phases.count(PADDING), d))
    generated = now == GENERATED
    assert counters.tolist() == [3 + int(generated.sum()), 5 + int(found[generated].sum())]
    reference = REFERENCE.sparse_ffn(*arguments, expected_counters, phases=now.to(device), **how).cpu()
    assert oracle.relative_error(y, reference.double()) <= 0.01 + 3 * tolerance(dtype, ops)
    if not differs.any():
        assert torch.equal(counters, expected_counters)


def check_mixed(
    tokens: int, d: int, h: int, dtype: torch.dtype, dtypes: list[torch.dtype], device: str, *, by: str,
    seed: int = 0, ops: Ops = TRITON,
) -> None:  # fmt: skip
    """`sparse_ffn`, `select` and `given_ffn` of an x and weights of other dtypes against float64 and the reference."""
    weights, biases = ffn(d, h, torch.float32, device, bias=True, seed=seed)
    gate, up, down = (weight.to(other) for weight, other in zip(weights, dtypes, strict=True))
    weights = [gate, up, down.t().contiguous().t()]
    x = inputs(tokens, d, dtype, device, seed)
    how, thresholds, active = decided(by, x, weights, biases, 0.6)
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    with poisoned():
        found = ops.select(x, weights, biases, thresholds, **how)
        y = ops.sparse_ffn(x, weights, biases, thresholds, counters, **how)
        given = ops.given_ffn(x, weights, biases, found, activation="silu")
    assert y.dtype == given.dtype == dtype
    exact = dtype == torch.float32 or by == "proxy-4"
    assert (found.cpu() != active).sum().item() <= (0 if exact else 0.02 * tokens * h + 1)
    assert torch.equal(found, REFERENCE.select(x, weights, biases, thresholds, **how)) or not exact
    a, u = oracle.projections(x.cpu(), on_cpu(weights), on_cpu(biases), "silu")
    expected = oracle.combine(a, u, found.cpu(), on_cpu(weights), on_cpu(biases))
    assert oracle.relative_error(y.cpu(), expected) <= 3 * tolerance(dtype, ops)
    assert oracle.relative_error(given.cpu(), expected) <= tolerance(dtype, ops)


def prediction(d: int, device: str, *, seed: int = 0) -> list[Weight]:
    """A random L [d, d] in 4 bits, what its columns are times, and b, of inputs that differ a hundredfold."""
    generator = torch.Generator().manual_seed(seed + 2)
    matrix = quantise(torch.randn(d, d, generator=generator) / d**0.5, torch.ones(d), 4)
    channels = 10 ** (2 * torch.rand(1, d, generator=generator) - 1)
    bias = torch.randn(1, d, generator=generator)
    return [part.to(torch.device(device)) for part in (matrix, Plain([channels]), Plain([bias]))]


def check_affine(
    tokens: int, d: int, h: int, dtype: torch.dtype, device: str, *, by: str, share: float = 0.6,
    phases: list[int] | None = None, bias: bool = False, seed: int = 0, ops: Ops = TRITON,
) -> None:  # fmt: skip
    """What is predicted of dropped neurons, added to sparse tokens: against float64, from `sparse` and `given`."""
    weights, biases = ffn(d, h, dtype, device, bias=bias, seed=seed)
    x = inputs(tokens, d, dtype, device, seed)
    now = torch.zeros(tokens, dtype=torch.uint8) if phases is None else torch.tensor(phases, dtype=torch.uint8)
    how, thresholds, _ = decided(by, x, weights, biases, share)
    if tokens > 2:
        x[1, d // 2] = torch.inf
    matrix, channels, offset = added = prediction(d, device, seed=seed)
    given_phases = None if phases is None else now.to(device)
    counters, others = (
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    with poisoned():
        y = ops.sparse_ffn(x, weights, biases, thresholds, counters, phases=given_phases, added=added, **how).cpu()
        plain = ops.sparse_ffn(x, weights, biases, thresholds, others, phases=given_phases, **how).cpu()
        active = ops.select(x, weights, biases, thresholds, phases=given_phases, **how)
        given = ops.given_ffn(x, weights, biases, active, activation=how["activation"], added=added).cpu()
    assert counters.tolist() == others.tolist()
    steps, size = token_steps(x.cpu().float() / channels.values().cpu())
    exact = (steps * size).double() @ matrix.values().cpu().double().T + offset.values().cpu().double()
    finite = x.cpu().isfinite().all(dim=1)
    predicted = torch.where((finite & (now == GENERATED))[:, None], exact, 0)
    kept = finite  # of others nothing can be compared
    found = (y.double() - plain.double())[kept]
    scale = float(plain.double()[kept].norm()) + float(exact[kept].norm())
    assert float((found - predicted[kept]).norm()) <= 2 * tolerance(dtype, ops) * scale
    generated = finite & (now == GENERATED)
    assert float((given.double() - y.double())[generated].norm()) <= 2 * tolerance(dtype, ops) * scale


def linear(d: int, out: int, dtype: torch.dtype, device: str, *, bias: bool = False, seed: int = 0):
    """Random weight [out, d], laid out by input channel, and bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(d, out, generator=generator) / d**0.5).to(dtype).to(device).t()
    return weight, torch.randn(out, generator=generator).to(dtype).to(device) if bias else None


def low_rank(d: int, out: int, rank: int, dtype: torch.dtype, device: str, *, seed: int = 0):
    """Random factors [rank, d], laid out by input channel, and [out, rank]."""
    generator = torch.Generator().manual_seed(seed + 1)
    inner = (torch.randn(d, rank, generator=generator) / d**0.5).to(dtype).to(device).t()
    return inner, (torch.randn(out, rank, generator=generator) / max(rank, 1) ** 0.5).to(dtype).to(device)


def check_linear(
    tokens: int, d: int, out: int, dtype: torch.dtype, device: str, *, share: float, weight_dtype=None,
    phases: list[int] | None = None, bias: bool = False, seed: int = 0, ops: Ops = TRITON, rank: int | None = None,
) -> None:  # fmt: skip
    """A sparse linear against float64: values, counters, active sets, and the same from `select` and `given`.

    With a rank, random factors of it stand for the channels that are dropped. An input is its own indicator, so active
    sets are exact in every dtype; a third of thresholds are inputs themselves.
    """
    weight, offset = linear(d, out, weight_dtype or dtype, device, bias=bias, seed=seed)
    x = inputs(tokens, d, dtype, device, seed)
    sizes = x.cpu().float().abs()
    thresholds = sizes.quantile(share) * torch.rand(d, generator=torch.Generator().manual_seed(seed)).mul(0.4).add(0.8)
    thresholds[::3] = sizes[seed % tokens, ::3]
    active = ~(sizes <= thresholds)
    now = None
    if phases is not None:
        now = torch.tensor(phases, dtype=torch.uint8)
        active = (active | (now == PROMPT)[:, None]) & (now != PADDING)[:, None]
        x[(now == PADDING).to(device), d // 2] = torch.nan
    generated = torch.ones(tokens, dtype=torch.bool) if now is None else now == GENERATED
    how = {"decision": "threshold", "drop": int(share * d), "indicator": "input"}
    added = () if rank is None else low_rank(d, out, rank, weight_dtype or dtype, device, seed=seed)
    given_phases, per_channel = None if now is None else now.to(device), thresholds.to(device)
    counters = torch.tensor([3, 5], device=device)
    with poisoned():
        y = ops.sparse_linear(x, weight, offset, per_channel, counters, phases=given_phases, added=added, **how).cpu()
        selected = ops.select_linear(x, weight, offset, per_channel, phases=given_phases, **how).cpu()
        also = torch.tensor([7, 9], device=device)
        given = ops.given_linear(x, weight, offset, active.to(device), added=added, counters=also).cpu()
    assert also.tolist() == [7 + tokens, 9 + int(active.sum())]
    assert torch.equal(selected, active)
    assert counters.tolist() == [3 + int(generated.sum()), 5 + int(active[generated].sum())]
    expected = torch.where(active, x.cpu().double(), 0) @ weight.cpu().double().T
    expected = expected if offset is None else expected + offset.cpu().double()
    # One sum of few terms may cancel: as exact as what it is made of.
    scale = torch.where(active, x.cpu().double().abs(), 0) @ weight.cpu().double().abs().T
    if added:
        dropped = ~active if now is None else ~active & (now != PADDING)[:, None]
        inner, outer = (factor.cpu().double() for factor in added)
        inputs_ = torch.where(dropped, x.cpu().double(), 0)
        expected = expected + inputs_ @ inner.T @ outer.T
        scale = scale + inputs_.abs() @ inner.abs().T @ outer.abs().T
    allowed = tolerance(dtype, ops) * float(expected.norm()) + 1e-6 * float(scale.norm())
    assert y.dtype == given.dtype == dtype
    assert float((y.double() - expected).norm()) <= allowed
    # What is given is summed as it is, padding too.
    kept = slice(None) if now is None else now != PADDING
    assert float((given.double() - expected)[kept].norm()) <= allowed


def check_together(
    tokens: int, d: int, heights: list[int], dtype: torch.dtype, device: str, together, ranks: list[int] | None = None
) -> None:
    """Linears that read the same x, side by side, against each by itself in the reference; with and without biases."""
    x = inputs(tokens, d, dtype, device, 0)
    each = [linear(d, out, dtype, device, bias=place != 1, seed=place) for place, out in enumerate(heights)]
    thresholds = [torch.full((d,), 0.3 * (1 + place), device=device) for place in range(len(heights))]
    counters = [torch.tensor([place, 7], device=device) for place in range(len(heights))]
    added = [low_rank(d, out, rank, dtype, device) for out, rank in zip(heights, ranks, strict=True)] if ranks else []
    weights = [[weight, *(added[place] if added else ())] for place, (weight, _) in enumerate(each)]
    with poisoned():
        y = together(
            x, [part for parts in weights for part in parts], [bias for _, bias in each], thresholds, counters,
            formats=["plain"] * sum(map(len, weights)), selector="input", rule="threshold",
            drops=[d // 2] * len(heights), compensation="svd" if added else "",
        )  # fmt: skip
    first = 0
    for place, ((weight, bias), out) in enumerate(zip(each, heights, strict=True)):
        counted = torch.tensor([place, 7], device=device)
        how = {"decision": "threshold", "drop": 0, "indicator": "input", "added": added[place] if added else ()}
        expected = REFERENCE.sparse_linear(x, weight, bias, thresholds[place], counted, **how)
        assert torch.equal(counters[place], counted)
        assert oracle.relative_error(y[:, first : first + out].cpu(), expected.cpu().double()) <= 2 * tolerance(dtype)
        first += out
    assert y.shape == (tokens, first)
