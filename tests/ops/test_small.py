"""Small operations in the library against torch's own, in every variant that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from countdown.ops.cpu.library import library, missing
from countdown.ops.cpu.small import small_calls

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no CPU kernels: {missing()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (37,), (2, 3, 1, 17), (1, 1, 1031), (3, 1, 2, 1024))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.tensor(4.0)
    if values.numel() > 5:
        values.view(-1)[1:4] = torch.tensor([float("inf"), float("nan"), 0.0])
    return values.to(dtype)


def done(name: str, args: tuple, like: torch.Tensor, **kwargs) -> torch.Tensor:
    """Return what the library makes of it, from memory that holds something else."""
    made = torch.full_like(like, 77)
    calls = small_calls(name, args, kwargs, made)
    assert calls
    library().again(calls)()
    return made


def same(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(made.isnan(), expected.isnan())
    assert torch.equal(made.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_give_torchs_bits(variant, shape, dtype):
    x, z = inputs(shape, dtype), inputs(shape, dtype, seed=1)
    for name, args, expected in (
        ("aten::add", (x, z), x + z),
        # A number that float16 holds: torch rounds others to it first, for sums.
        ("aten::add", (x, 0.25), x + 0.25),
        ("aten::mul", (x, z), x * z),
        ("aten::mul", (x, 0.3), x * 0.3),
        ("aten::neg", (x,), -x),
        ("aten::pow", (x, 2), x.pow(2)),
        ("aten::rsqrt", (x,), x.float().rsqrt().to(dtype)),
        ("aten::relu", (x,), x.relu()),
        ("aten::clone", (x,), x),
    ):
        same(done(name, args, expected), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_means(variant, dtype):
    x = inputs((2, 3, 1500), dtype)[..., 5:].clone()
    for made, exact in (
        (done("aten::silu", (x,), x), F.silu(x.double())),
        (done("aten::gelu", (x,), x, approximate="tanh"), F.gelu(x.double(), approximate="tanh")),
        (done("aten::gelu", (x,), x), F.gelu(x.double())),
        (done("aten::mean", (x, [-1], True), x[..., :1]), x.double().mean(-1, keepdim=True)),
    ):
        torch.testing.assert_close(made.double(), exact, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 512, 1031])
def test_the_largest_of_each_row(variant, size, dtype):
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    x[1, -1], x[2, size // 2], x[3], x[4] = torch.inf, torch.nan, -torch.inf, -x[4].abs()
    for one in (x, x.t().contiguous().t()):
        same(done("aten::amax", (one, [-1]), x[:, 0]), x.amax(-1))
    assert not small_calls("aten::amax", (x, [0]), {}, x.amax(0))


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_changed(variant, dtype, source):
    x = inputs((3, 41), source)
    same(done("aten::_to_copy", (x,), x.to(dtype), dtype=dtype), x.to(dtype))
    # A product of two dtypes is one of the wider.
    z = inputs((41,), dtype, seed=1)
    same(done("aten::mul", (x, z), x * z), x * z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(variant, dtype):
    x, row, column = inputs((5, 4, 33), dtype), inputs((33,), dtype, seed=1), inputs((4, 1), dtype, seed=2)
    for one in (x, x.transpose(0, 2), x[:, ::2], x[..., 3:], x[..., ::3]):
        z = row[: one.shape[-1]] if one.shape[-1] <= 33 else row
        same(done("aten::neg", (one,), one), -one)
        same(done("aten::add", (one, z), one), one + z)
    same(done("aten::mul", (x, column), x), x * column)
    made = torch.zeros(9, 66, dtype=dtype)
    library().again(small_calls("aten::copy_", (made[::2, ::2], row), {}, made[::2, ::2]))()
    same(made[::2, ::2], row.expand(5, 33))
    assert not made[1::2].any()
    assert not made[:, 1::2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dimension", [0, 2, -1])
def test_parts_are_joined(variant, dimension, dtype):
    shapes = {0: [(1, 3, 9), (4, 3, 9)], 2: [(2, 3, 9), (2, 3, 1)], -1: [(2, 3, 5), (2, 3, 7), (2, 3, 0)]}[dimension]
    parts = [inputs(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    expected = torch.cat(parts, dimension)
    same(done("aten::cat", (parts, dimension), expected), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_is_put_into_a_cache_and_nothing_beyond_it(variant, dtype):
    cache, token = torch.zeros(1, 3, 10, 16, dtype=dtype), inputs((1, 3, 1, 16), dtype)
    at = torch.tensor([4])
    again = library().again(small_calls("aten::index_copy_", (cache, 2, at, token), {}, cache))
    for place in (4, 9):
        at.fill_(place)
        again()
        same(cache[:, :, place : place + 1], token)
    for place in (10, -1):
        at.fill_(place)
        before = cache.clone()
        again()
        same(cache, before)


def test_integers_are_added(variant):
    whole, big = torch.arange(-6, 6).view(3, 4), torch.tensor([2**60 + 1])
    same_integers(done("aten::add", (whole, 7), whole), whole + 7)
    same_integers(done("aten::add", (whole.t(), whole[:, :1].t()), whole.t()), whole.t() + whole[:, :1].t())
    same_integers(done("aten::add", (big, -1), big), big - 1)
    count, expected = whole.clone(), whole + 1
    library().again(small_calls("aten::add_", (count, 1), {}, count))()
    same_integers(count, expected)


def same_integers(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert made.dtype == torch.int64
    assert torch.equal(made, expected)


def test_what_is_not_known_is_left_to_torch():
    x, whole = torch.ones(3, 4), torch.ones(3, dtype=torch.int64)
    for name, args, kwargs, made in (
        ("aten::add", (x, x), {"alpha": 2}, x),
        ("aten::add", (whole, 2**60), {}, whole),
        ("aten::add", (whole, 0.5), {}, x[:, 0]),
        ("aten::mul", (whole, whole), {}, whole),
        ("aten::neg", (whole,), {}, whole),
        ("aten::mul", (whole, x[:, 0]), {}, x[:, 0]),
        ("aten::mean", (x, [0], True), {}, x[:1]),
        ("aten::mean", (x, [-1]), {}, x[:, 0]),
        ("aten::pow", (x, 3), {}, x),
        ("aten::neg", (x.double(),), {}, x.double()),
        ("aten::neg", (x.view(1, 1, 1, 3, 4),), {}, x.view(1, 1, 1, 3, 4)),
        ("aten::cat", ([x, x.double()],), {}, x.double()),
        ("aten::index_copy_", (x, 0, torch.tensor([0, 2]), x[:2]), {}, x),
        ("aten::mm", (x, x), {}, x),
    ):
        assert small_calls(name, args, kwargs, made) == []
