"""Text as tokens come."""

from __future__ import annotations

import pytest

from countdown.engine.streaming import TextStream


def streamed(tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(stream.add(token))
        if stream.stopped is not None:
            break
    return [*pieces, stream.end()], stream.stopped


@pytest.mark.parametrize("text", ["plain text", "naïve – 日本語 🎉🎉 end", "", "🎉"])
def test_pieces_make_the_text_and_no_character_is_cut(text, tokenizer):
    pieces, _ = streamed(tokenizer, text)
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)


def test_what_stays_incomplete_is_shown_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    tokens = tokenizer("a🎉")["input_ids"]
    assert "".join(stream.add(token) for token in tokens[:-1]) == "a"
    assert stream.end().startswith("�")


@pytest.mark.parametrize(
    ("stop", "expected", "found"),
    [
        (("cd",), "ab", "cd"),
        (("xyz",), "abcdefcd", None),
        (("de", "cd"), "ab", "cd"),
        (("ef", "def"), "abc", "def"),
        (("cdx", "efc"), "abcd", "efc"),
        (("cdd",), "abcdefcd", None),  # held back until the end
        (("",), "abcdefcd", None),
    ],
)
def test_a_text_ends_before_the_first_stop_string(stop, expected, found, tokenizer):
    pieces, stopped = streamed(tokenizer, "abcdefcd", stop)
    assert ("".join(pieces), stopped) == (expected, found)


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
    stream = TextStream(tokenizer, ["STOP"])
    assert [stream.add(token) for token in tokenizer("aSTxSTO")["input_ids"]] == ["a", "", "", "STx", "", "", ""]
    assert stream.end() == "STO"


def test_nothing_comes_after_a_stop_string(tokenizer):
    stream = TextStream(tokenizer, ["b"])
    assert [stream.add(token) for token in tokenizer("abc")["input_ids"]] == ["a", "", ""]
    assert stream.end() == ""
