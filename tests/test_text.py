"""Texts, the detokeniser and windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import countdown
from countdown.errors import ConfigError, TextError
from countdown.text import Text, detokenise, load_text, windows
from tiny import byte_tokenizer, llama


@pytest.mark.parametrize(
    "tokenised, plain",
    [
        ("a well @-@ known 10 @,@ 000 and 3 @.@ 5", "a well-known 10,000 and 3.5"),
        ("the <unk> of <unk> , he said .", "the unknown of unknown, he said."),
        ('he said " yes , please " ( twice ) !', 'he said "yes, please" (twice)!'),
        ("the king 's 50 % ; so : what ?", "the king's 50%; so: what?"),
        (" = Heading = \n", " = Heading = \n"),
    ],
)
def test_detokenise(tokenised, plain):
    assert detokenise(tokenised) == plain


def test_python_docs_has_two_disjoint_parts():
    calibration, evaluation = (load_text("python-docs", split) for split in ("calibration", "evaluation"))
    # Room for 32k tokens to calibrate on and 16 windows to evaluate on, at three characters a token.
    assert len(calibration.content) > 3 * 32768
    assert len(evaluation.content) > 3 * 16 * 512
    paragraphs = [{p.strip() for p in t.content.split("\n\n")} for t in (calibration, evaluation)]
    assert not paragraphs[0] & paragraphs[1]
    assert calibration.sha256 != evaluation.sha256


def test_wikitext_from_a_folder(tmp_path):
    (tmp_path / "valid.txt").write_text("one @-@ two", encoding="utf-8")
    (tmp_path / "test.txt").write_text("three @-@ four", encoding="utf-8")
    assert load_text("wikitext2", "calibration", text_dir=tmp_path).content == "one-two"
    assert load_text("wikitext2", "evaluation", text_dir=tmp_path).content == "three-four"


def test_any_file(tmp_path):
    (tmp_path / "mine.txt").write_text("α text", encoding="utf-8")
    text = load_text(str(tmp_path / "mine.txt"), "evaluation")
    assert (text.content, text.describe()["source"]) == ("α text", "mine.txt")


def test_bad_sources(tmp_path):
    with pytest.raises(TextError, match="Did you mean 'wikitext2'"):
        load_text("wikitext", "calibration")
    with pytest.raises(TextError, match=r"has no valid\.txt"):
        load_text("wikitext2", "calibration", text_dir=tmp_path)
    with pytest.raises(TextError, match="belongs to --text wikitext2"):
        load_text("python-docs", "calibration", text_dir=tmp_path)
    with pytest.raises(ConfigError, match="split is 'test'"):
        load_text("python-docs", "test")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="UTF-8"):
        load_text(str(tmp_path / "binary"), "evaluation")
    (tmp_path / "valid.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match="UTF-8"):
        load_text("wikitext2", "calibration", text_dir=tmp_path)
    with pytest.raises(TextError, match="neither a file nor"):
        load_text("a text given in place of its name " * 20, "evaluation")


def test_windows_do_not_overlap(tokenizer):
    rows = windows(tokenizer, "abcdefghij", length=3)
    assert [tokenizer.decode(row) for row in rows] == ["abc", "def", "ghi"]
    assert torch.equal(windows(tokenizer, "abcdefghij", count=2, length=3), rows[:2])
    assert torch.equal(
        windows(tokenizer, ["abcdef", "hij"], count=3, length=3)[2], windows(tokenizer, "\nhi", length=3)[0]
    )


def test_windows_start_with_bos_where_the_tokenizer_adds_it():
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    rows = windows(tokenizer, "abcdefghij", length=3)
    assert rows[:, 0].tolist() == [256] * 3
    assert [tokenizer.decode(row[1:]) for row in rows] == ["ab", "de", "gh"]


@pytest.mark.parametrize("count", [None, 5])
def test_too_short_a_text_is_said(tokenizer, count):
    with pytest.raises(TextError, match="too few for"):
        windows(tokenizer, "abc", count=count, length=4)


def test_windows_of_a_loaded_text_are_those_of_what_it_says(tokenizer):
    text, other = Text("a", "all", "abcdef"), Text("b", "all", "hij")
    assert torch.equal(countdown.windows(tokenizer, text, length=3), windows(tokenizer, "abcdef", length=3))
    assert torch.equal(windows(tokenizer, [text, other], length=3), windows(tokenizer, "abcdef\nhij", length=3))


@pytest.mark.parametrize(
    "texts, message",
    [
        (None, "the text is of type NoneType, expected a string, what countdown.load_text returns"),
        (Path("mine.txt"), "the text is of type PosixPath"),
        (["abc", 3], "one of the texts is of type int"),
        (torch.zeros(2, 3), "one of the texts is of type Tensor"),
        ([], "there is no text"),
    ],
)
def test_what_is_no_text_is_refused(texts, message, tokenizer):
    with pytest.raises(TextError, match=message):
        windows(tokenizer, texts, length=3)
    with pytest.raises(TextError, match=message):
        countdown.calibrate(llama(), tokenizer, texts, countdown.method("cats"), progress=False)


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="the tokenizer is of type NoneType"):
        windows(None, "abc", length=3)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert load_text(tmp_path / "a.txt", "evaluation").content == "abc"


def test_a_text_shows_in_one_line():
    assert repr(Text("a", "all", "abc\n" * 99)) == "Text(source='a', split='all')"
