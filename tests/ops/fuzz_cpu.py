"""Random cases of the CPU kernels against float64: python tests/ops/fuzz_cpu.py LIBRARY CASES

Arrays are as large as they must be and not larger, so that a checker of memory sees what is read beyond them.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernel_cases as cases
import oracle
from calls import CPU
from countdown.ops import backends, dense
from countdown.ops.cpu import dense_ops
from countdown.ops.cpu import library as cpu_library
from countdown.ops.cpu.library import Library, Ran
from countdown.ops.cpu.small import small_calls
from countdown.phase import GENERATED, PADDING, PROMPT
from countdown.weights import int4


def main() -> None:
    """Run them; the number of a case that fails is its seed."""
    library = Library(Path(sys.argv[1]))
    cpu_library.library = dense_ops.library = lambda: library
    cpu_library._GRAIN = 256  # small as they are, on several threads
    count = int(sys.argv[2])
    for seed in range(count):
        draw = random.Random(seed)
        torch.set_num_threads(draw.choice([1, 2, 3]))
        library.take_variant(draw.choice(library.variants))
        try:
            with library.watched() as row:
                checks = [
                    check_ffn, check_ffn, check_int4, check_looks, check_predicted, check_linear, check_dense,
                    check_small,
                ]  # fmt: skip
                draw.choice(checks)(draw, seed)
            check_again(draw, library, row)
        except Exception:
            print(f"case {seed} failed", file=sys.stderr)
            raise
    print(f"{count} cases")


def check_again(draw: random.Random, library: Library, row: list[Ran]) -> None:
    """The same calls, one after the other, give the same bits on any threads; counters go on."""
    made = [tensor for ran in row for tensor in ran.tensors[:-1] if tensor.is_floating_point()]
    before = [tensor.clone() for tensor in made]
    library.again(row, apart=draw.random() < 0.7)()
    assert all(torch.equal(now.nan_to_num(), then.nan_to_num()) for now, then in zip(made, before, strict=True))


def check_ffn(draw: random.Random, seed: int) -> None:
    """One FFN: whatever decides, the sum is that of the active sets, and these differ at thresholds only."""
    d, h, tokens = draw.randint(1, 150), draw.randint(1, draw.choice([120, 600])), draw.randint(1, 8)
    form, activation = draw.choice(["split", "fused", "interleaved"]), draw.choice(backends.BACKENDS["cpu"].activations)
    by = draw.choice(["up", "gate", "coefficient", "proxy-4"])
    weights, biases = cases.ffn(d, h, torch.float32, "cpu", bias=draw.random() < 0.5, seed=seed, form=form)
    dtype, weights, biases = cast(draw, weights, biases)
    skip = draw.randint(0, 3)
    x = torch.randn(tokens, d + skip, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, skip:]
    phases = torch.tensor([draw.choice([GENERATED, GENERATED, PROMPT, PADDING]) for _ in range(tokens)]).byte()
    phases = draw.choice([None, phases])
    counted, padding = (torch.ones(tokens).bool(), []) if phases is None else (phases == GENERATED, phases == PADDING)
    proxy = cases.proxy_of(weights) if by == "proxy-4" else None
    factors = oracle.projections(x, weights, biases, activation)
    a, u = factors if proxy is None else oracle.proxy_factors(x, proxy, biases, activation)
    value = {"up": u, "gate": a}.get(by, a * u).abs()
    thresholds = value.quantile(draw.random()).float().expand(h).clone()
    if proxy is not None and draw.random() < 0.5:
        proxy = [type(tiles)(map(misplaced, tiles.parts), tiles.shape) for tiles in (part.in_tiles() for part in proxy)]
    if draw.random() < 0.3:
        x[padding] = torch.nan
    how = {"decision": "threshold", "drop": 0, "indicator": by, "activation": activation, "proxy": proxy}
    counters = torch.zeros(2, dtype=torch.int64)
    active = CPU.select(x, weights, biases, thresholds, phases=phases, **how)
    y = CPU.sparse_ffn(x, weights, biases, thresholds, counters, phases=phases, **how)
    given = CPU.given_ffn(x, weights, biases, active, activation=activation)
    assert counters.tolist() == [int(counted.sum()), int(active[counted].sum())]
    assert phases is None or (active[phases == PROMPT].all() and not active[padding].any())
    rounding = 1e-4 if proxy is not None or dtype == torch.float32 else 2e-2
    near = (value - thresholds.double()).abs() <= rounding * (1 + value)
    assert (near | (active == (value > thresholds.double())))[counted].all()
    expected = oracle.combine(*factors, active, weights, biases)
    # Sums that cancel, or are of one neuron, are as exact as their terms.
    scale = oracle.combine(*(f.abs() for f in factors), active, [w.abs() for w in weights], [None] * 3).norm()
    allowed = 3 * cases.TOLERANCE[dtype] * float(scale + expected.norm() + 1e-6)
    assert float((y.double() - expected).norm()) <= allowed
    assert float((given.double() - expected).norm()) <= allowed


def check_int4(draw: random.Random, seed: int) -> None:
    """An FFN whose weights are in 4 bits, in arrays that end where the last row does."""
    d, h, tokens = 64 * draw.randint(1, draw.choice([3, 20])), draw.randint(1, 200), draw.randint(1, 8)
    plain, biases = cases.ffn(d, h, torch.float32, "cpu", bias=draw.random() < 0.5, seed=seed)
    stored = [int4.rounded(plain[0]), int4.rounded(plain[1]), int4.rounded(plain[2], by_column=True)]
    weights = [type(weight)([misplaced(weight.parts[0])], weight.shape) for weight in stored]
    values, dtype = [weight.values() for weight in weights], draw.choice(list(cases.TOLERANCE))
    x, by = cases.inputs(tokens, d, dtype, "cpu", seed), draw.choice(["up", "gate", "coefficient"])
    thresholds = torch.full((h,), draw.random())
    how = {"indicator": by, "activation": draw.choice(backends.BACKENDS["cpu"].activations)}
    active = CPU.select(x, weights, biases, thresholds, **how)
    y = CPU.sparse_ffn(x, weights, biases, thresholds, torch.zeros(2, dtype=torch.int64), **how)
    factors = oracle.projections(x, values, biases, how["activation"])
    expected = oracle.combine(*factors, active, values, biases)
    scale = oracle.combine(*(f.abs() for f in factors), active, [w.abs() for w in values], [None] * 3).norm()
    assert float((y.double() - expected).norm()) <= 3 * cases.TOLERANCE[dtype] * float(scale + expected.norm() + 1e-6)


def check_looks(draw: random.Random, seed: int) -> None:
    """Two looks at the neurons of an FFN of any size."""
    tokens = draw.randint(1, 8)
    phases = torch.tensor([draw.choice([GENERATED, GENERATED, PROMPT, PADDING]) for _ in range(tokens)]).byte()
    cases.check_second_look(
        tokens, draw.randint(1, 150), draw.randint(1, draw.choice([120, 600])), draw.choice(list(cases.TOLERANCE)),
        "cpu", indicator=draw.choice(["up", "gate"]),
        activation=draw.choice(backends.BACKENDS["cpu"].activations), shares=(draw.random(), draw.random()),
        bias=draw.random() < 0.5, form=draw.choice(["split", "fused", "interleaved"]), seed=seed,
        phases=draw.choice([None, phases]), ops=CPU,
    )  # fmt: skip


def check_predicted(draw: random.Random, seed: int) -> None:
    """What is predicted of the dropped neurons of an FFN of any size, by whatever decides."""
    tokens = draw.randint(1, 8)
    phases = [draw.choice([GENERATED, GENERATED, PROMPT, PADDING]) for _ in range(tokens)]
    cases.check_affine(
        tokens, draw.randint(1, draw.choice([40, 300])), draw.randint(1, 200), draw.choice(list(cases.TOLERANCE)),
        "cpu", by=draw.choice(["up", "gate", "coefficient", "proxy-4"]), share=draw.random(),
        phases=draw.choice([None, phases]), bias=draw.random() < 0.5, seed=seed, ops=CPU,
    )  # fmt: skip


def check_linear(draw: random.Random, seed: int) -> None:
    """One sparse linear of any size, dtypes and phases."""
    tokens = draw.randint(1, 8)
    phases = [draw.choice([GENERATED, GENERATED, PROMPT, PADDING]) for _ in range(tokens)]
    dtypes = list(cases.TOLERANCE)
    cases.check_linear(
        tokens, draw.randint(1, draw.choice([40, 700])), draw.randint(1, draw.choice([40, 300])), draw.choice(dtypes),
        "cpu", share=draw.random(), weight_dtype=draw.choice(dtypes), phases=draw.choice([None, phases]),
        bias=draw.random() < 0.5, seed=seed, ops=CPU, rank=draw.choice([None, draw.randint(0, 80)]),
    )  # fmt: skip


def cast(draw: random.Random, weights: list, biases: list) -> tuple[torch.dtype, list, list]:
    """Return the dtype of x, weights and biases: all of one dtype, or each of its own."""
    dtypes = list(cases.TOLERANCE)
    dtype, alike = draw.choice(dtypes), draw.random() < 0.5

    def some(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(dtype if alike else draw.choice(dtypes))

    return dtype, [some(weight) for weight in weights], [some(bias) for bias in biases]


def misplaced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an odd address."""
    memory = torch.empty(tensor.nbytes + 1, dtype=torch.uint8)[1:]
    memory.copy_(tensor.flatten().view(torch.uint8))
    return torch.frombuffer(memory.numpy(), dtype=tensor.dtype).view(tensor.shape)


def check_dense(draw: random.Random, seed: int) -> None:
    """Linears side by side, and attention."""
    dtype, d = draw.choice(list(cases.TOLERANCE)), draw.randint(1, 200)
    heights = [draw.randint(1, 60) for _ in range(draw.randint(1, 3))]
    weights = [cases.inputs(rows, d, dtype, "cpu", seed + rows) for rows in heights]
    biases = [draw.choice([None, cases.inputs(1, rows, dtype, "cpu", seed)[0]]) for rows in heights]
    x = cases.inputs(1, d, dtype, "cpu", seed)
    exact = [[t if t is None else t.double() for t in some] for some in ([x], weights, biases)]
    expected = dense.project(exact[0][0], exact[1], exact[2])
    allowed = cases.TOLERANCE[dtype] * (float(expected.norm()) + d**0.5)
    assert float((dense_ops.project(x, weights, biases).double() - expected).norm()) <= allowed
    groups, each, length, size = draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 90), draw.randint(1, 80)
    q = cases.inputs(groups * each, size, dtype, "cpu", seed).view(1, groups * each, 1, size)
    keys, values = (
        cases.inputs(length, groups * size, dtype, "cpu", seed + s).view(1, length, groups, size).transpose(1, 2)
        for s in (1, 2)
    )
    mask = torch.rand(1, 1, 1, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[..., draw.randrange(length)] = True
    mask = draw.choice([None, mask])
    expected = dense.attend_one(q.double(), keys.double(), values.double(), mask, 0.2)
    y = dense_ops.attend_one(q, keys, values, mask, 0.2)
    # What cancels is as exact as what it is made of.
    allowed = 2 * cases.TOLERANCE[dtype] * float(expected.norm() + 0.1 * values.double().norm())
    assert float((y.double() - expected).norm()) <= allowed


def check_small(draw: random.Random, seed: int) -> None:
    """A small operation on tensors of any shape, dtypes and strides."""
    shape = [draw.choice([1, 2, 3, draw.randint(1, 1100)]) if place == 0 else draw.randint(1, 5) for place in range(4)]
    dims = draw.randint(1, 4)
    draw.shuffle(shape)
    shape = shape[:dims]

    def tensor(more: int) -> torch.Tensor:
        skip, dtype = draw.randint(0, 3), draw.choice(list(cases.TOLERANCE))
        sizes = [1 if more and draw.random() < 0.2 else size for size in shape]
        whole = torch.randn([*sizes[:-1], sizes[-1] + skip], generator=torch.Generator().manual_seed(seed + more))
        some = whole.to(dtype)[..., skip:]
        return some.flip(0).transpose(0, -1).contiguous().transpose(0, -1) if draw.random() < 0.3 else some

    x, z = tensor(0), tensor(1)
    name, args, expected = draw.choice(
        [
            ("aten::add", (x, z), x + z),
            ("aten::mul", (x, z), x * z),
            ("aten::neg", (x,), -x),
            ("aten::pow", (x, 2), x**2),
            ("aten::relu", (x,), x.relu()),
            ("aten::clone", (x,), x),
            ("aten::amax", (x, [-1]), x.amax(-1)),
            ("aten::mean", (x, [-1], True), x.double().mean(-1, keepdim=True).to(x.dtype)),
            ("aten::cat", ([x, x.neg()], draw.randrange(dims)), None),
        ]
    )
    expected = torch.cat(*args) if expected is None else expected
    made = torch.full(expected.shape, 77.0, dtype=expected.dtype)
    cpu_library.library().again(small_calls(name, args, {}, made))()
    torch.testing.assert_close(
        made, expected, rtol=0 if name != "aten::mean" else 1e-2, atol=0 if name != "aten::mean" else 1e-2
    )


if __name__ == "__main__":
    main()
