"""The decode loop writes what `generate` writes, for every class that is accepted; minutes, so in `make test-all`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from calls import made_sparse
from countdown.decoding import DecodeLoop
from countdown.errors import UnsupportedModelError
from countdown.joint import Joint
from countdown.sites.decoder import decoder_of
from fused_loop import FusedLoop
from scripts import BENCHMARKS, script

pytestmark = pytest.mark.slow

RECORDS = json.loads((BENCHMARKS / "results" / "census.json").read_text())["records"]
ACCEPTED = [record["class"] for record in RECORDS if record["outcome"] == "accepted"]
CAUSAL = [record["class"] for record in RECORDS if record["outcome"] == "accepted" and "causal" in record["mapping"]]

NEW_TOKENS = 80
# Attention slides, and rotations change, after so many tokens: within the answer.
SWITCH = 32
# Some towers cannot be made small; their text models are those of smaller classes.
MOST_PARAMETERS = 500_000_000
# What keeps its state elsewhere than in a cache's layers, or attends in its own way. All others run in the loop.
REFUSED = {
    "DogeForCausalLM": "mask does not fit",
    "MoshiForCausalLM": "attends to tokens that its cache",
    "MllamaForCausalLM": "keeps nothing of a prompt",
    "MllamaForConditionalGeneration": "keeps nothing of a prompt",
    "PaliGemmaForConditionalGeneration": "counts positions otherwise",
    "RecurrentGemmaForCausalLM": "keeps nothing of a prompt",
    "T5Gemma2ForConditionalGeneration": "has an encoder",
    "xLSTMForCausalLM": "does not run in the decode loop",
}
PROMPT = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def census() -> Iterator[Any]:
    """The script that makes a small model of every class."""
    module = script("census")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.SIZES, "sliding_window", SWITCH)
        yield module


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def own_text(model: nn.Module) -> tuple[Tensor, Tensor]:
    """What `generate` writes, `[tokens]`, and the logits that it chose from, `[tokens, vocabulary]`."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(PROMPT, output_logits=True, return_dict_in_generate=True, **settings)
    return written.sequences[0, PROMPT.shape[1] :], torch.cat(written.logits)


def built(census: Any, name: str, change: Callable[[Any, nn.Module], None] | None = None) -> nn.Module:
    """A small model, dense, whose every matrix matters to what it writes; skips what does not write from text."""
    if (cls := getattr(transformers, name, None)) is None:
        pytest.skip("not in this transformers")
    torch.manual_seed(0)
    model = census.build(cls)
    if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
        pytest.skip("too large")
    if change is not None:
        change(model.config.get_text_config(decoder=True), model)
        model = cls(model.config).float().eval()
    with torch.no_grad():
        for parameter in decoder_of(model)[0].parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if (head := model.get_output_embeddings()) is not None:  # tied, it would say its input again and again
            head.weight = nn.Parameter(torch.randn_like(head.weight) * head.weight.shape[-1] ** -0.5)
    return model


def check(model: nn.Module, refused: str | None, *, near: float = 0.0) -> None:
    """The loop, and the one of GPUs, writes what `generate` writes; or it says why not, and leaves the model as it was.

    Args:
        model: The model.
        refused: Why it is refused, if it is.
        near: Where the two part, the logits of both tokens are no further apart than this, in standard deviations: a
            neuron at its threshold may fall to either side, as the sums before it are not rounded alike.
    """
    own, logits = own_text(model)
    if refused is not None:
        with pytest.raises(UnsupportedModelError, match=refused):
            DecodeLoop(model, PROMPT, new_tokens=NEW_TOKENS)
        assert torch.equal(own_text(model)[0], own)
        return
    texts = {}
    for loop in (DecodeLoop, FusedLoop):
        started = loop(model, PROMPT, new_tokens=NEW_TOKENS)
        texts[f"{loop.__name__}, at first"] = started.run(NEW_TOKENS)
        # As the engine does: another prompt in what was traced, then this one again.
        started.restart(PROMPT.flip(1)[:, :5], new_tokens=3)
        started.run(3)
        started.restart(PROMPT, new_tokens=NEW_TOKENS)
        texts[f"{loop.__name__}, again"] = started.run(NEW_TOKENS)
        started.restart(PROMPT, new_tokens=NEW_TOKENS)
        texts[f"{loop.__name__}, beside others"] = beside_others(started)
    for when, written in texts.items():
        if not torch.equal(written, own):
            at = int((written != own).nonzero()[0])
            apart = logits[at, own[at]] - logits[at, written[at]]
            assert apart < near * logits[at].std(), f"they part at token {at}, {when}"


def beside_others(loop: DecodeLoop) -> Tensor:
    """What a loop behind its prompt writes while it shares steps with two others, one of which ends early."""
    others = [type(loop)(loop.model, PROMPT[:, n:] + n, new_tokens=NEW_TOKENS // n) for n in (1, 2)]
    joint, written = Joint(), []
    for _ in range(NEW_TOKENS):
        joint.advance([one for one in (loop, *others) if one.left])
        written.append(loop.token[0, 0].clone())
    return torch.stack(written)


@pytest.mark.parametrize("name", ACCEPTED)
def test_dense_and_sparse_across_the_window(census, name):
    model = built(census, name)
    try:
        own_text(model)
    except Exception as error:
        pytest.skip(f"writes nothing from text alone: {error}")
    check(model, REFUSED.get(name))
    made_sparse(model, per_term=0.3)
    check(model, REFUSED.get(name), near=0.01)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in REFUSED])
def test_across_the_length_at_which_rotations_change(census, name, rope_type):
    def change(config: Any, model: nn.Module) -> None:
        frequencies = [buffer.numel() for path, buffer in model.named_buffers() if path.endswith("inv_freq")]
        before = getattr(config, "rope_parameters", None)
        if not frequencies or not before or "rope_type" not in before or before["rope_type"] != "default":
            pytest.skip("its rotations are its own")
        factors = {"short_factor": [1.0] * frequencies[0], "long_factor": [4.0] * frequencies[0]}
        more = {"longrope": factors, "dynamic": {"factor": 4.0}}[rope_type]
        switch = {"original_max_position_embeddings": SWITCH}
        config.rope_parameters = before | {"rope_type": rope_type} | switch | more
        config.original_max_position_embeddings = SWITCH
        config.max_position_embeddings = 4 * SWITCH

    model = built(census, name, change)
    starts_again = "Phi3" in name or "Phi4" in name
    check(model, {"longrope": "starts again" if starts_again else None, "dynamic": "rotations anew"}[rope_type])
