"""Steps done again from a recording."""

from __future__ import annotations

import pytest
import torch

from countdown.errors import UnsupportedModelError
from countdown.replay import recorded


def test_it_does_again_what_was_done_with_what_is_there_now():
    x, weight, seen = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 4.0]]), torch.zeros(2)

    def step() -> None:
        y = (weight @ x.view(3, 1).relu()).squeeze(1)
        seen.copy_(torch.cat([y[1:], y[:1]]))
        x.neg_()

    again = recorded(step)
    x.copy_(torch.tensor([-1.0, 5.0, 2.0]))
    again()
    assert seen.tolist() == [13.0, 11.0]
    again()
    assert seen.tolist() == [0.0, 1.0]


def test_what_a_step_changes_is_read_by_the_next():
    count, total = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    def step() -> None:
        total.add_(count * 10)
        count.add_(1)

    again = recorded(step)  # two steps
    again()
    again()
    assert (count.item(), total.item()) == (4, 60)


def test_memory_that_is_filled_within_a_step_starts_afresh():
    x, out = torch.ones(3), torch.zeros(3)

    def step() -> None:
        sums = torch.zeros(3)
        sums.add_(x)
        sums[:1] += 1
        out.copy_(sums)

    again = recorded(step)
    for _ in range(3):
        again()
    assert out.tolist() == [2.0, 1.0, 1.0]


def test_several_results_and_views_keep_their_places():
    x, out = torch.tensor([[3.0, 1.0, 2.0]]), torch.zeros(3)

    def step() -> None:
        values, places = x.sort()
        out.copy_(values.t()[:, 0] + places[0].flip(0))
        x.mul_(-1)

    again = recorded(step)
    x.copy_(torch.tensor([[5.0, 9.0, 7.0]]))
    again()
    assert out.tolist() == [5.0 + 1, 7.0 + 2, 9.0 + 0]


def test_what_is_the_same_in_every_step_is_not_done_again():
    table, x = torch.arange(4.0), torch.zeros(4)
    again = recorded(lambda: x.add_(table.cos().exp()))
    table.fill_(0)  # not by the step
    again()
    assert torch.allclose(x, 3 * torch.arange(4.0).cos().exp())


@pytest.mark.parametrize(
    "step, why",
    [
        (lambda x: x.mul_(2) if x.sum() > 0 else x.add_(1), "reads the value of a tensor in Python"),
        (lambda x: x.add_(int(x[0])), "reads the value of a tensor in Python"),
    ],
)
def test_what_depends_on_values_is_refused(step, why):
    x = torch.ones(2)
    with pytest.raises(UnsupportedModelError, match=why):
        recorded(lambda: step(x))


def test_a_step_that_counts_in_python_is_refused():
    x, numbers = torch.ones(4), iter(range(9))
    with pytest.raises(UnsupportedModelError, match="counts in Python"):
        recorded(lambda: x.add_(next(numbers)))


def test_a_step_that_hands_on_tensors_in_python_is_refused():
    kept, seen = [torch.ones(4)], torch.zeros(4)

    def step() -> None:
        kept[0] = kept[0] * 2  # not in the same memory
        seen.copy_(kept[0])

    with pytest.raises(UnsupportedModelError, match="keeps tensors in Python"):
        recorded(step)


def test_everything_is_done_again_where_its_time_is_wanted():
    x, made = torch.ones(3), []
    again = recorded(lambda: made.append(x * 2), everything=True)
    x.fill_(5)
    again()
    assert made[-1].tolist() == [10.0, 10.0, 10.0]
