"""What every kernel must satisfy, on whatever device: shared by the interpreter's tests and those of the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import oracle
from countdown.ops import proxy as proxies
from countdown.ops.cpu import library
from countdown.ops.triton import ops as triton_ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def tolerance(dtype: torch.dtype, ops: Any = triton_ops) -> float:
    """Return the relative error that is allowed; Triton's interpreter truncates to bfloat16, where devices round."""
    interpreted = ops is triton_ops and not torch.cuda.is_available()
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
    bias: bool = False, form: str = "split", seed: int = 0, ops: Any = triton_ops,
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
        given = ops.given_ffn(x, weights, biases, expected_active.to(device), activation=activation)
    # fp16 and bf16 may round an indicator across a threshold that lies within half a step of it.
    steps = (active.cpu() != expected_active).sum().item()
    assert steps <= (0 if dtype == torch.float32 else 0.02 * tokens * h + 1)
    if steps == 0:
        assert counters.tolist() == [3 + tokens, 5 + int(expected_active.sum())]
        assert oracle.relative_error(y.cpu(), expected) <= tolerance(dtype, ops)
    own = oracle.combine(a, u, active.cpu(), cpu_weights, cpu_biases)
    assert oracle.relative_error(y.cpu(), own) <= 3 * tolerance(dtype, ops)
    assert oracle.relative_error(given.cpu(), expected) <= tolerance(dtype, ops)


def proxy_of(weights: list[Tensor], bits: int = 4) -> list[Tensor]:
    """Levels and scales of gate and up, all inputs as important."""
    matrices = [proxies.quantise(weight, torch.ones(weight.shape[1]), bits) for weight in weights[:2]]
    return [part for matrix in matrices for part in (matrix.levels, matrix.scales)]


def check_proxy(
    tokens: int, d: int, h: int, dtype: torch.dtype, device: str, *, activation: str, share: float,
    bias: bool = False, form: str = "split", seed: int = 0, ops: Any = triton_ops,
) -> None:  # fmt: skip
    """`sparse_ffn` and `select` by a 4-bit proxy against float64: active sets, values, counters."""
    weights, biases = ffn(d, h, dtype, device, bias=bias, seed=seed, form=form)
    x = inputs(tokens, d, dtype, device, seed)
    proxy = proxy_of(weights)
    cpu_weights, cpu_biases = on_cpu(weights), on_cpu(biases)
    unpack = proxies.dequantise if d * h > 10**6 else None
    a, u = oracle.proxy_factors(x.cpu(), on_cpu(proxy), cpu_biases, activation, unpack)
    thresholds = clear_thresholds(a * u, share)
    expected_active = ~((a * u).abs() <= thresholds.double())
    how = {"decision": "threshold", "drop": int(share * h), "indicator": "proxy", "activation": activation}
    per_neuron, counters = thresholds.to(device), torch.tensor([3, 5], device=device)
    with poisoned():
        y = ops.sparse_ffn(x, weights, biases, per_neuron, counters, proxy=proxy, **how)
        active = ops.select(x, weights, biases, per_neuron, proxy=proxy, **how)
    assert torch.equal(active.cpu(), expected_active)
    assert counters.tolist() == [3 + tokens, 5 + int(expected_active.sum())]
    exact = oracle.projections(x.cpu(), cpu_weights, cpu_biases, activation)
    expected = oracle.combine(*exact, expected_active, cpu_weights, cpu_biases)
    assert oracle.relative_error(y.cpu(), expected) <= tolerance(dtype, ops)
