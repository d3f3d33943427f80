"""Bytes of a token, counted by hand."""

from __future__ import annotations

import pytest
import torch

from countdown.cost import ceiling, token_bytes, weights_read
from countdown.methods import method
from countdown.sites.ffn import find_ffns
from tiny import llama

FFN = 3 * 3 * 24 * 53 * 4
ATTENTION = 3 * (24 * 24 + 24 * 12 + 24 * 12 + 24 * 24) * 4
NORMS = (3 * 2 * 24 + 24) * 4
TABLE = 257 * 24 * 4


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_counts_once_if_it_is_the_head(tied):
    model = llama(tie_word_embeddings=tied)
    found = token_bytes(model, find_ffns(model))
    assert (found.own, found.other) == (FFN, ATTENTION + NORMS + TABLE)


def test_half_the_bytes_in_bfloat16():
    model = llama(torch.bfloat16)
    assert token_bytes(model, find_ffns(model)).own == FFN // 2


def test_ceiling():
    model = llama()
    found = token_bytes(model, find_ffns(model))
    row = ceiling(found, [(find_ffns(model), method("m-countdown", sparsity=0.7))], "m-countdown")
    assert row.weights_read == pytest.approx(1.6 / 3)
    assert row.own_speedup == pytest.approx(3 / 1.6)
    assert row.token_speedup == pytest.approx(found.total / (found.other + found.own * 1.6 / 3))
    assert ceiling(found, [(find_ffns(model), method("m-countdown", sparsity=0.0))], "").token_speedup == 1.0


@pytest.mark.parametrize(
    "name, active, expected",
    [("m-countdown", 0.3, 1.6 / 3), ("cats", 0.1, 1.2 / 3), ("d-countdown", 0.3, 2.3 / 3), ("cats", 1.0, 1.0)],
)
def test_weights_read(name, active, expected):
    assert weights_read(find_ffns(llama()), method(name), [active]) == pytest.approx(expected)


def test_of_two_looks_columns_are_read_of_what_the_second_leaves():
    ffns, config = find_ffns(llama()), method("m-countdown", sparsity=0.6, second_look=0.25)
    assert weights_read(ffns, config) == pytest.approx((1 + 0.5 + 0.3) / 3)
    assert weights_read(ffns, config, [0.9, 0.1]) == pytest.approx(2 / 3)
    assert weights_read(ffns, method("cats", sparsity=0.1, second_look=0.25)) == pytest.approx((1 + 1.0 + 0.8) / 3)


def test_a_proxy_counts_as_read():
    # 4 bits and a 16-bit scale for 64 weights, of two matrices out of three.
    ffns = find_ffns(llama(torch.bfloat16, hidden_size=64))
    assert weights_read(ffns, method("d-proxy"), [0.2]) == pytest.approx(0.2 + 2 / 3 * 4.25 / 16)
    ffns = find_ffns(llama(hidden_size=64))
    assert weights_read(ffns, method("d-proxy", bits=3), [0.2]) == pytest.approx(0.2 + 2 / 3 * 3.25 / 32)
