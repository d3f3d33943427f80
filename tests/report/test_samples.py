"""Answers beside the dense one: what is marked, and what is said."""

from __future__ import annotations

from countdown.comparison.comparison import Sample
from countdown.report.samples import Piece, mark


def sample(*tokens: int) -> Sample:
    return Sample(list(tokens), [f" {token}" for token in tokens])


def test_what_the_dense_model_did_not_write_there_is_marked():
    marked = mark("x", sample(1, 2, 8, 9, 3), sample(1, 2, 3))
    assert marked.pieces == [Piece(" 1 2", False), Piece(" 8 9", True), Piece(" 3", False)]
    assert marked.note == "As dense up to token 2; 2 of 5 tokens differ."


def test_equal_answers_have_no_marks():
    marked = mark("x", sample(1, 2), sample(1, 2))
    assert marked.pieces == [Piece(" 1 2", False)]
    assert marked.note == "The same 2 tokens as dense."


def test_an_answer_that_stops_early_differs_in_no_token_it_has():
    marked = mark("x", sample(1), sample(1, 2))
    assert marked.pieces == [Piece(" 1", False)]
    assert marked.note == "As dense up to token 1; 0 of 1 token differ."


def test_tokens_are_compared_and_not_their_text():
    marked = mark("x", Sample([5], ["same"]), Sample([6], ["same"]))
    assert marked.pieces == [Piece("same", True)]
    assert marked.note == "Other than dense from the first token on; 1 of 1 token differ."


def test_without_a_dense_answer_nothing_is_marked():
    assert mark("x", sample(1, 2), None).pieces == [Piece(" 1 2", False)]
