"""What passes over a text hold at once."""

from __future__ import annotations

import pytest
import torch

from countdown import memory
from countdown.memory import batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def sequences(*lengths):
    return [torch.full((length,), place) for place, length in enumerate(lengths)]


def shapes(found):
    return [tuple(batch.shape) for batch in found]


def test_neighbours_of_equal_length_share_a_batch_in_their_order():
    found = batches(sequences(9, 9, 7, 9, 9, 9), CPU, terms=1)
    assert shapes(found) == [(2, 9), (1, 7), (3, 9)]
    assert [row[0].item() for batch in found for row in batch] == list(range(6))


@pytest.mark.parametrize("logits", [0, 4000])
def test_a_batch_takes_what_is_said_and_no_more(logits, monkeypatch):
    monkeypatch.setattr(memory, "BATCH_BYTES", 3 * 100 * (logits + 50 * memory.TERM_BYTES) + 1)
    assert shapes(batches(sequences(*[100] * 7), GPU, terms=50, logits=logits)) == [(3, 100), (3, 100), (1, 100)]


def test_a_sequence_that_is_too_long_runs_alone(monkeypatch):
    monkeypatch.setattr(memory, "BATCH_BYTES", 1)
    assert shapes(batches(sequences(100, 100), GPU, terms=1)) == [(1, 100), (1, 100)]
    assert shapes(batches(sequences(600, 600, 256, 256, 256), CPU, terms=1)) == [(1, 600), (1, 600), (2, 256), (1, 256)]
