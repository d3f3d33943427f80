"""Texts to calibrate and evaluate on, and how they become windows of tokens.

`wikitext2` and `python-docs` have two fixed, disjoint splits: `calibration` and `evaluation`. Any other source
is a UTF-8 file, used as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from countdown.config import check_choice, suggestion
from countdown.errors import ConfigError, TextError

BUILT_IN = ("wikitext2", "python-docs")
SPLITS = ("calibration", "evaluation")
WINDOW = 512


@dataclass(frozen=True)
class Text:
    """A text and where it comes from.

    Args:
        source: `wikitext2`, `python-docs` or a file's name.
        split: `calibration`, `evaluation`, or `all` for a file.
        content: The text itself.
    """

    source: str
    split: str
    content: str = field(repr=False)

    @property
    def sha256(self) -> str:
        """Hash of the content, to tell two versions of a text apart."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def describe(self) -> dict[str, str]:
        """Return source, split and hash, without the content."""
        return {**{k: v for k, v in asdict(self).items() if k != "content"}, "sha256": self.sha256}


def load_text(source: str | os.PathLike[str], split: str, *, text_dir: str | Path | None = None) -> Text:
    """Load a text.

    Args:
        source: `wikitext2`, `python-docs`, or the path of a UTF-8 text file.
        split: `calibration` or `evaluation`; files have one split and ignore it.
        text_dir: For `wikitext2`: a folder with `valid.txt` and `test.txt` in tokenised form, instead of the hub.

    Raises:
        TextError: The text cannot be found or read.

    Example:
        text = countdown.load_text("python-docs", "calibration")
    """
    check_choice("split", split, SPLITS)
    if not isinstance(source, str | os.PathLike):
        raise TextError(f"the source is of type {type(source).__name__}, expected the name of a text, or a path.")
    source = os.fspath(source)
    if source == "wikitext2":
        return Text(source, split, detokenise(_wikitext2(split, text_dir)))
    if text_dir is not None:
        raise TextError(f"--text-dir belongs to --text wikitext2, but the text is '{source}'.")
    if source == "python-docs":
        return Text(source, split, _python_docs(split))
    path = Path(os.path.expanduser(source))
    if not _is_file(path):
        raise TextError(
            f"text '{source}' is neither a file nor one of: {', '.join(BUILT_IN)}.{suggestion(source, BUILT_IN)}"
        )
    return Text(path.name, "all", read_text(path, "text file"))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text given in place of its name is too long for one
        return False


def read_text(path: Path, what: str) -> str:
    """Return the text in a UTF-8 file, without the byte-order mark that some editors put first.

    Args:
        path: The file.
        what: What it is, as the message says it.

    Raises:
        TextError: It cannot be read, or not as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TextError(f"{what} {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{what} {path} cannot be read as UTF-8: {error}.") from error


def is_text(text: str) -> bool:
    """Return whether this can be written in UTF-8: JSON escapes and file names can hold half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def detokenise(text: str) -> str:
    """Undo the tokenised form in which WikiText is published: `<unk>`, ` @-@ `, spaces around punctuation."""
    for spaced, plain in (
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" <unk>", " unknown"),
        ("( ", "("),
    ):
        text = text.replace(spaced, plain)
    text = re.sub(r" ([.,;:!?)'%])", r"\1", text)
    return re.sub(r'" (.*?) "', r'"\1"', text)


def _wikitext2(split: str, text_dir: str | Path | None) -> str:
    name = {"calibration": "valid", "evaluation": "test"}[split]
    if text_dir is not None:
        path = Path(os.path.expanduser(text_dir)) / f"{name}.txt"
        if not path.is_file():
            raise TextError(f"--text-dir {text_dir} has no {name}.txt; it needs WikiText-2's valid.txt and test.txt.")
        return read_text(path, "text file")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(
            "wikitext2 is fetched with the package datasets: pip install 'countdown-llm[eval]', "
            "or give a local copy with --text-dir."
        ) from error
    try:
        hub_split = {"valid": "validation", "test": "test"}[name]
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-v1", split=hub_split)
    except Exception as error:  # datasets raises whatever its network layer raised
        raise TextError(
            f"wikitext2 cannot be fetched from the hub ({str(error).splitlines()[0]}); give a local copy with "
            "--text-dir, or use --text python-docs, which needs no network."
        ) from error
    return "".join(rows["text"])


def _python_docs(split: str) -> str:
    from pydoc_data.topics import topics

    # Topics repeat each other's paragraphs; each paragraph counts once, where it comes first in alphabetical
    # order of topics, so that the splits share none.
    seen: set[str] = set()
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for index, name in enumerate(sorted(topics)):
        paragraphs = [p for p in dict.fromkeys(topics[name].split("\n\n")) if p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        # Every fourth topic is for evaluation.
        parts["evaluation" if index % 4 == 3 else "calibration"].extend(paragraphs)
    return "\n\n".join(parts[split])


def unpadded(batch: Mapping[str, Any]) -> list[Tensor]:
    """Return the sequences of a padded batch, each int64 `[length]`, without their padding.

    Args:
        batch: What a tokenizer returns: `input_ids` and `attention_mask`, each `[n, length]`, padded left or right;
            or lists of unequal length without padding.

    Raises:
        TextError: There is no `input_ids`, the two differ in shape, or a sequence is empty or nothing but padding.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or not len(ids):
        raise TextError("the batch has no input_ids; give what a tokenizer returns, or text.")
    rows = [_integers(row) for row in ids]
    if any(row.numel() and row.is_floating_point() for row in rows):
        raise TextError(f"input_ids are {rows[0].dtype}, expected integers.")
    kept = [torch.ones_like(row) for row in rows] if mask is None else [_integers(row) for row in mask]
    shapes = [[tuple(row.shape) for row in some] for some in (rows, kept)]
    if shapes[0] != shapes[1] or any(len(shape) != 1 for shape in shapes[0]):
        raise TextError("input_ids and attention_mask do not fit together; expected [n, length] of both.")
    sequences = [row[keep.bool()] for row, keep in zip(rows, kept, strict=True)]
    if not all(len(sequence) for sequence in sequences):
        raise TextError("a sequence of the batch is empty, or nothing but padding.")
    return sequences


def _integers(row: Any) -> Tensor:
    if isinstance(row, Tensor):
        return row
    return torch.as_tensor(row, dtype=None if len(row) else torch.int64, device="cpu")


def as_texts(texts: str | Text | Iterable[str | Text]) -> list[str | Text]:
    """Return a text, or several, as a list.

    Raises:
        TextError: One of them is no text, or there is none.
    """
    expected = "expected a string, what countdown.load_text returns, or a list of these"
    if not isinstance(texts, Iterable | Text):
        raise TextError(f"the text is of type {type(texts).__name__}, {expected}.")
    given = [texts] if isinstance(texts, str | Text) else list(texts)
    if not given:
        raise TextError("there is no text; give some.")
    for one in given:
        if not isinstance(one, str | Text):
            raise TextError(f"one of the texts is of type {type(one).__name__}, {expected}.")
    return given


def windows(
    tokenizer: Any,
    texts: str | Text | Iterable[str | Text],
    *,
    count: int | None = None,
    at_least: int = 1,
    length: int = WINDOW,
) -> Tensor:
    """Return the first `count` non-overlapping windows of a text, int64 `[count, length]`.

    The texts are joined by newlines and tokenised once, without special tokens. Where the tokenizer itself
    starts a text with BOS, every window starts with it, in place of its last token.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The text, or several: strings, or what `load_text` returns.
        count: How many windows; all when omitted, which must then be `at_least` so many.
        length: Tokens in a window, at least 2.

    Raises:
        TextError: The text is too short for one window, or for `count`; or it is no text.
        ConfigError: What is given as tokenizer is none, or windows of fewer than 2 tokens are asked for.

    Example:
        text = countdown.load_text("python-docs", "evaluation")
        ids = countdown.windows(tokenizer, text, count=2)
    """
    if not callable(tokenizer):
        raise ConfigError(
            f"the tokenizer is of type {type(tokenizer).__name__}, expected one of transformers; "
            "countdown.load_tokenizer loads one."
        )
    if length < 2:
        raise ConfigError(f"windows have {length} tokens, expected at least 2.")
    text = "\n".join(one.content if isinstance(one, Text) else one for one in as_texts(texts))
    ids = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64, device="cpu"
    )
    available = len(ids) // length
    needed = at_least if count is None else count
    if available < needed:
        raise TextError(
            f"the text has {len(ids)} tokens, too few for {needed} windows of {length}; "
            "give a longer text or ask for fewer tokens."
        )
    wanted = available if count is None else count
    rows = ids[: wanted * length].view(wanted, length)
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        rows = torch.cat([torch.full((wanted, 1), bos, dtype=torch.int64, device="cpu"), rows[:, :-1]], dim=1)
    return rows
