"""Weights in 4 bits."""

from __future__ import annotations

import copy

import pytest
import torch

from countdown.errors import ConfigError
from countdown.weights import FORMATS, Plain
from countdown.weights.int4 import GROUP, HIGHEST, Int4ByColumn, rounded, unpacked


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def on_the_grid(rows, columns):
    """A matrix whose values are levels times scales that float16 holds, each group with the highest level."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 16, (rows, columns // GROUP, GROUP), generator=generator)
    levels[..., 0] = 15
    scales = 2.0 ** torch.randint(-9, 3, (rows, columns // GROUP, 1), generator=generator)
    return ((levels - HIGHEST) * scales).flatten(1)


def test_values_on_the_grid_stay_as_they_are():
    matrix = on_the_grid(1030, 192)  # more rows than are rounded at once
    assert torch.equal(rounded(matrix).values(), matrix)
    assert torch.equal(rounded(matrix.t(), by_column=True).values(), matrix.t())


def test_bytes_lie_as_the_documentation_says():
    matrix = on_the_grid(3, 128)
    packed = rounded(matrix).parts[0]
    assert packed.shape == (3, 2 * 34)
    for row, group, entry in ((0, 0, 0), (1, 1, 17), (2, 0, 63), (2, 1, 40)):
        k, j = divmod(entry, 16)
        word = int(packed[row, 32 * group + 2 * j]) | int(packed[row, 32 * group + 2 * j + 1]) << 8
        scale = float(packed[row, 64 + 2 * group : 66 + 2 * group].clone().view(torch.float16))
        assert ((word >> 4 * k & 15) - 7.5) * scale == matrix[row, 64 * group + entry]


def test_each_weight_takes_the_nearest_level():
    matrix = random(40, 256)
    weight = rounded(matrix)
    scales = weight.parts[0][:, 4 * 32 :].clone().view(torch.float16).float().repeat_interleave(GROUP, dim=1)
    clipped = matrix.clamp(-HIGHEST * scales, HIGHEST * scales)
    assert ((weight.values() - clipped).abs() <= scales / 2 * 1.0001).all()
    assert (weight.values() - matrix).norm() < 0.1 * matrix.norm()


def test_scales_heed_which_inputs_are_large():
    matrix, sizes = random(64, 128), torch.ones(128)
    matrix[:, 5::GROUP] *= 6  # outliers that widen every range
    sizes[5::GROUP] = 1e-3
    errors = [((rounded(matrix, weights=by).values() - matrix).square() * sizes).sum() for by in (None, sizes)]
    assert errors[1] < 0.8 * errors[0]


def test_a_group_of_zeros_is_zeros_and_others_do_not_feel_it():
    matrix = random(2, 192)
    matrix[0, 64:128] = 0
    found = rounded(matrix).values()
    assert not found[0, 64:128].any()
    assert torch.equal(found[1], rounded(matrix[1:]).values()[0])


@pytest.mark.parametrize("by_column", [False, True])
def test_groups_that_do_not_divide_are_refused(by_column):
    matrix = random(63, 65)
    with pytest.raises(ConfigError, match="do not divide into groups of 64"):
        rounded(matrix, by_column=by_column)


def test_it_is_stored_by_row_or_by_column():
    matrix = random(64, 128)
    by_row, by_column = rounded(matrix), rounded(matrix, by_column=True)
    assert (by_row.shape, by_column.shape) == ((64, 128), (64, 128))
    assert (by_row.lies_by(1), by_row.lies_by(0)) == (True, False)
    assert (by_column.lies_by(1), by_column.lies_by(0)) == (False, True)
    assert by_column.by_column() is by_column
    assert torch.equal(by_column.values(), rounded(matrix.t()).values().t())
    with pytest.raises(ConfigError, match="'int4' cannot be laid out by column"):
        by_row.by_column()


def test_whole_rows_or_columns_are_cut_out():
    by_row, by_column = rounded(random(8, 128)), rounded(random(64, 9), by_column=True)
    some = by_row.sliced(0, slice(1, 8, 2))
    assert torch.equal(some.values(), by_row.values()[1::2])
    assert some.parts[0].data_ptr() == by_row.parts[0][1].data_ptr()
    assert torch.equal(by_column.sliced(1, slice(2, 5)).values(), by_column.values()[:, 2:5])
    for weight, dim in ((by_row, 1), (by_column, 0)):
        with pytest.raises(ConfigError, match="cannot be sliced"):
            weight.sliced(dim, slice(0, 64))


def test_products_are_those_of_its_values():
    x, bias = random(3, 128), torch.randn(7)
    weight = rounded(random(7, 128, seed=2))
    expected = x.double() @ weight.values().double().t() + bias
    torch.testing.assert_close(weight.product(x, bias).double(), expected, rtol=1e-5, atol=1e-5)
    assert weight.product(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [FORMATS.get("int4"), Int4ByColumn])
def test_parts_that_do_not_fit_are_named(cls):
    right = rounded(random(64, 64), by_column=cls is Int4ByColumn)
    assert right.problem() is None
    wrong = {"int8": right.parts[0].view(torch.int8), "short": right.parts[0][:, :-1]}
    for packed in wrong.values():
        assert "expected uint8 (64, 34)" in cls([packed], (64, 64)).problem()
    again = copy.deepcopy(right)
    assert torch.equal(again.values(), right.values())
    assert type(again) is cls


def test_it_takes_four_and_a_quarter_bits():
    assert rounded(random(64, 640)).nbytes * 8 == 64 * 640 * 4.25
    assert unpacked(rounded(random(64, 640)).parts[0]).shape == (64, 640)
    # By column a plain matrix is a view, as kernels read it.
    assert Plain([random(4, 6)]).lies_by(1)
    assert not Plain([random(4, 6)]).lies_by(0)
