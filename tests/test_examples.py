"""The examples in the docstrings of the public API run as they stand."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch

import countdown
from countdown.phase import GENERATED, PADDING, PROMPT
from tiny import byte_tokenizer, llama

# What an example may name, beside `countdown`.
EXAMPLES = [
    "load_text", "method", "calibrate", "sparsify_", "status", "evaluate", "phases", "restore_",
    "Profile.with_settings", "from_pretrained", "export", "choose", "compare", "windows", "search_alpha",
    "decode_loop", "Engine",
]  # fmt: skip


def example(name: str) -> str:
    found = countdown
    for part in name.split("."):
        found = getattr(found, part)
    doc = inspect.getdoc(found)
    assert "Example:\n" in doc, f"{name} has no example"
    return textwrap.dedent(doc.partition("Example:\n")[2])


@pytest.fixture
def names(tmp_path, monkeypatch, tokenizer, text):
    """A model and what goes with it, in an empty folder with a model and a profile saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTDOWN_CACHE", str(tmp_path / "cache"))
    model = llama(max_position_embeddings=4096)
    model.save_pretrained("my-model")
    byte_tokenizer().save_pretrained("my-model")
    profile = countdown.calibrate(model, tokenizer, text, countdown.method("cats"), tokens=1024, progress=False)
    profile.save("my-profile")
    return {
        "countdown": countdown, "torch": torch, "model": model, "tokenizer": tokenizer,
        "text": text, "profile": profile, "ids": torch.tensor([[5, 17, 90, 3]]), "GENERATED": GENERATED,
        "PADDING": PADDING, "PROMPT": PROMPT,
    }  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, names):
    if name in ("status", "evaluate", "phases", "restore_"):
        countdown.sparsify_(names["model"], names["profile"])
    with torch.no_grad():
        exec(compile(example(name), name, "exec"), names)


def test_every_public_function_has_one():
    functions = [name for name in countdown.__all__ if inspect.isfunction(getattr(countdown, name))]
    without = {"load_tokenizer", "method_names", "reset_counters"}  # called with a name or a model, and no more
    assert set(functions) - without == {*EXAMPLES, "recipe"} - {"Profile.with_settings", "Engine"}
