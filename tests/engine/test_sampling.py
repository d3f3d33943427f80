"""How tokens are chosen, held to transformers' own processors."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as theirs

from countdown.engine.sampling import Sampler, Sampling, as_array, place_of, remaining, unheeded_in_sampling
from countdown.errors import ConfigError, UnsupportedModelError

VOCABULARY = 501


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


CASES = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 10_000, "top_p": 0.999},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_left_is_what_transformers_leaves(case, seed):
    logits, processors = logits_of(seed), theirs.LogitsProcessorList()
    processors.append(theirs.TemperatureLogitsWarper(case["temperature"]))
    if "top_k" in case:
        processors.append(theirs.TopKLogitsWarper(case["top_k"]))
    if "top_p" in case:
        processors.append(theirs.TopPLogitsWarper(case["top_p"]))
    if "min_p" in case:
        processors.append(theirs.MinPLogitsWarper(case["min_p"]))
    expected = processors(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].softmax(-1)
    tokens, probabilities = remaining(as_array(logits), Sampling(**case))
    found = torch.zeros(VOCABULARY)
    found[torch.arange(VOCABULARY) if tokens is None else torch.from_numpy(tokens)] = torch.from_numpy(probabilities)
    torch.testing.assert_close(found / found.sum(), expected)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.0, 1.0, 2.0, -20.0])
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [])
    drawn = [sampler.choose(logits).token for _ in range(4000)]
    shares = torch.tensor([drawn.count(token) / 4000 for token in range(4)])
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.03, rtol=0)


def test_a_seed_repeats_an_answer_and_none_does_not():
    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=5.0, seed=seed), [])
        return [sampler.choose(logits_of(step)).token for step in range(12)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_is_transformers_own(penalty):
    logits, prompt, written = logits_of(0), [3, 8, 8, 100], []
    sampler = Sampler(Sampling(repetition_penalty=penalty), prompt)
    for step in range(6):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([[*prompt, *written]]), logits[None].clone()
        )
        written.append(sampler.choose(logits).token)
        assert written[-1] == int(expected.argmax()), step
    assert torch.equal(logits, logits_of(0))


def test_frequency_and_presence_count_the_answer_alone():
    logits = torch.tensor([5.0, 4.5, 4.0])
    sampler = Sampler(Sampling(frequency_penalty=0.4, presence_penalty=0.3), prompt=[0, 0, 0])
    # 5.0, 4.5; then 4.3 against 3.8; then 3.9, 3.8 and 4.0; then 3.9, 3.8 and 3.3.
    assert [sampler.choose(logits).token for _ in range(5)] == [0, 1, 0, 2, 0]


def test_logprobs_are_those_of_the_model_whatever_is_drawn_from():
    logits = logits_of(1)
    chosen = Sampler(Sampling(temperature=0.1, top_k=1, logprobs=3), []).choose(logits)
    expected = logits.log_softmax(-1)
    assert chosen.token == int(expected.argmax())
    assert chosen.logprob == pytest.approx(float(expected.max()))
    assert [token for token, _ in chosen.top] == expected.topk(3).indices.tolist()
    assert Sampler(Sampling(logprobs=0), []).choose(logits).top == ()


def test_greedy_takes_the_first_of_the_largest():
    assert Sampler(Sampling(), []).choose(torch.tensor([1.0, 2.0, 2.0])).token == 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_no_answer(temperature, wrong):
    logits = torch.tensor([0.0, 1.0, wrong])
    with pytest.raises(UnsupportedModelError, match="not finite"):
        Sampler(Sampling(temperature=temperature, logprobs=1), []).choose(logits)


@pytest.mark.parametrize("more", [{"top_k": 1}, {}, {"temperature": 1e-5}])
def test_a_top_p_that_leaves_nothing_leaves_the_likeliest(more):
    logits = torch.zeros(50)
    logits[7] = 0.0 if not more else 1.0
    token = Sampler(Sampling(**{"temperature": 1.0, "top_p": 1e-8, **more}), []).choose(logits).token
    assert token == (7 if more else 0)


def test_what_cannot_be_has_a_logarithm_all_the_same():
    chosen = Sampler(Sampling(logprobs=2), []).choose(torch.tensor([0.0, -math.inf, -math.inf]))
    assert (chosen.token, chosen.logprob, chosen.top[1][1]) == (0, 0.0, -9999.0)


def test_a_checkpoints_own_settings():
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    assert Sampling.of(config) == Sampling(temperature=0.6, top_k=20, top_p=0.95)
    # As transformers does where they are not given.
    assert Sampling.of(GenerationConfig(do_sample=True)) == Sampling(temperature=1.0, top_k=50)
    assert unheeded_in_sampling(GenerationConfig(do_sample=True, typical_p=0.9, epsilon_cutoff=0.0)) == ["typical_p"]
    assert unheeded_in_sampling(GenerationConfig(do_sample=False, typical_p=0.9)) == []
    # What does not sample is greedy, whatever else it has; a penalty holds for that, too.
    config = GenerationConfig(do_sample=False, temperature=0.6, repetition_penalty=1.1)
    assert Sampling.of(config) == Sampling(repetition_penalty=1.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"temperature": 1e-40},
        {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2},
        {"repetition_penalty": 0}, {"frequency_penalty": 3}, {"presence_penalty": -3}, {"logprobs": 21},
        {"logprobs": -1}, {"top_p": math.nan}, {"seed": 2**64},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name} is .*, expected"):
        Sampling(**wrong)


def test_other_settings_leave_what_is_not_given():
    assert Sampling(top_k=5).with_(temperature=0.5, top_p=None) == Sampling(top_k=5, temperature=0.5)
    with pytest.raises(ConfigError, match="sampling has no setting 'topk', only: temperature, top_k"):
        Sampling().with_(topk=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_every_dtype_are_read_exactly(dtype):
    logits = torch.cat([logits_of(0), torch.tensor([math.inf, -math.inf, 0.0, -0.0, 3e38])]).to(dtype)
    assert torch.equal(torch.from_numpy(as_array(logits)), logits.float())


def test_a_seed_may_be_negative():
    assert Sampler(Sampling(temperature=1.0, seed=-1), []).choose(logits_of(0)).token in range(VOCABULARY)


def test_no_token_is_drawn_that_is_not_left():
    # Rows of which all, or the last, are not left; and shares that round to the whole.
    probabilities = torch.rand(1000, generator=torch.Generator().manual_seed(0)).numpy()
    probabilities[:256] = probabilities[700:] = probabilities[500:515] = 0
    left = set(probabilities.nonzero()[0].tolist())
    expected = probabilities.cumsum(dtype="float64")
    for share in (0.0, 0.25, 0.5, 0.9, 1 - 1e-16):
        place = place_of(probabilities, share)
        assert place in left
        assert expected[place] >= share * expected[-1] * (1 - 1e-6)
        assert expected[place - 1] <= share * expected[-1] * (1 + 1e-6)
