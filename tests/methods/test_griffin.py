"""GRIFFIN: a set for each sequence, chosen from its prompt, whatever it is decoded with and however."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, StaticCache

import countdown
import oracle
from calls import written
from countdown.decoding import DecodeLoop
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.evaluation.evaluate import evaluate
from countdown.evaluation.generation import generate
from countdown.loading import cache_argument
from countdown.methods import method
from countdown.modules import chosen, running, sparse_modules
from countdown.phase import GENERATED, PROMPT, continuing, phases
from countdown.selectors import prompt
from countdown.sequences import beside, in_call, padding
from tiny import FAMILIES, byte_tokenizer, llama

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 250, (2, 9), generator=GENERATOR)
NEXT = torch.randint(0, 250, (2, 5), generator=GENERATOR)
WITHOUT_PROMPT = "griffin without a prompt"
SITES = [f"model.layers.{layer}.mlp" for layer in range(3)]


def griffin(model, sparsity=0.5):
    profile = countdown.calibrate(model, byte_tokenizer(), [], method("griffin", sparsity=sparsity), progress=False)
    return countdown.sparsify_(model, profile)


@pytest.fixture
def sparse(model):
    return griffin(model)


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model):
    return StaticCache(config=model.config, max_cache_len=64)


@torch.no_grad()
def fed(model, ids, cache, **more):
    """Logits of a call."""
    return model(ids, **cache_argument(model, cache), use_cache=True, **more).logits


def decoded(model, ids, after, *, mask=None, cache=None):
    """Logits after each token of `after`, fed one by one behind a prompt."""
    cache = cache or dynamic(model)
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    fed(model, ids, cache, attention_mask=mask, position_ids=positions)
    rows = []
    for place in range(after.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        position = mask.sum(1, keepdim=True) - 1
        rows.append(fed(model, after[:, place : place + 1], cache, attention_mask=mask, position_ids=position))
    return torch.cat(rows, dim=1)


def sets_in(cache):
    return torch.stack([beside(cache).active(site, torch.device("cpu")) for site in SITES])


def score_of(coefficients, neuron):
    """The paper's statistic, number by number."""
    total = 0.0
    for token in coefficients.tolist():
        norm = math.sqrt(sum(value * value for value in token))
        total += (token[neuron] / norm) ** 2 if norm else 0.0
    return math.sqrt(total)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_sets_and_sums_are_those_of_the_definition(sparsity):
    model = griffin(llama(torch.float64), sparsity)
    module, inputs, outputs = sparse_modules(model)[SITES[1]], [], []
    module.register_forward_hook(lambda _, x, y: inputs.append(x[0]) or outputs.append(y))
    cache = dynamic(model)
    fed(model, IDS[:1], cache)
    fed(model, NEXT[:1, :1], cache)
    weights = [linear.weight.detach() for linear in (module.gate_proj, module.up_proj, module.down_proj)]
    biases = [None] * 3
    a, u = oracle.projections(inputs[0][0], weights, biases, "silu")
    values = [score_of(a * u, neuron) for neuron in range(53)]
    kept = oracle.topk_active(values, math.floor(sparsity * 53))
    assert sets_in(cache)[1, 0].tolist() == kept
    a, u = oracle.projections(inputs[1][0], weights, biases, "silu")
    expected = oracle.combine(a, u, torch.tensor([kept]), weights, biases)
    assert oracle.relative_error(outputs[1][0], expected) < 1e-12


def test_scores_are_the_squares_of_the_statistic_in_pieces_too(monkeypatch):
    coefficients = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    whole = prompt.scores(coefficients)
    expected = [[score_of(row, neuron) for neuron in range(11)] for row in coefficients.double()]
    torch.testing.assert_close(whole.sqrt(), torch.tensor(expected, dtype=torch.float64))
    monkeypatch.setattr(prompt, "AT_ONCE", 3)
    torch.testing.assert_close(prompt.scores(coefficients), whole)


def test_tokens_that_say_nothing_add_nothing():
    coefficients = torch.randn(1, 5, 4)
    expected = prompt.scores(coefficients[:, 2:4])
    coefficients[0, 0], coefficients[0, 1, 2] = 0.0, torch.nan
    counted = torch.tensor([[True, True, True, True, False]])
    torch.testing.assert_close(prompt.scores(coefficients, counted), expected)


def test_of_equal_scores_the_lower_index_is_dropped_first():
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]).double()
    assert chosen(scores, drop=2).tolist() == [[False, True, False, True], [True] * 4]


def test_a_prompt_is_dense_and_what_follows_counts(model):
    dense = fed(model, IDS, dynamic(model))
    griffin(model)
    cache = dynamic(model)
    torch.testing.assert_close(fed(model, IDS, cache), dense)
    assert {site.tokens for site in countdown.status(model)} == {0}
    fed(model, NEXT[:, :1], cache)
    for site in countdown.status(model):
        assert (site.tokens, site.selector, site.backend_reason) == (2, "prompt", None)
        assert site.realised_sparsity == pytest.approx(26 / 53)
        assert site.weights_read == pytest.approx(27 / 53)


def test_sequences_of_a_batch_have_sets_of_their_own(sparse):
    together = decoded(sparse, IDS, NEXT)
    alone = [decoded(sparse, IDS[row : row + 1], NEXT[row : row + 1]) for row in range(2)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("kind", [dynamic, static])
def test_padding_chooses_nothing(kind, sparse):
    expected = decoded(sparse, IDS[:1, :4], NEXT[:1])
    padded = torch.cat([torch.full((1, 5), 7), IDS[:1, :4]], dim=1)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    cache = kind(sparse)
    found = decoded(sparse, torch.cat([padded, IDS[1:]]), NEXT, mask=mask, cache=cache)
    torch.testing.assert_close(found[:1], expected)
    other = dynamic(sparse)
    fed(sparse, IDS[:1, :4], other)
    assert torch.equal(sets_in(cache)[:, :1], sets_in(other))


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generate_pads_as_it_writes_alone(implementation, sparse):
    expected = written(sparse, IDS[:1, :4])
    padded = torch.cat([torch.zeros(1, 5).long(), IDS[:1, :4]], dim=1)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    ids = torch.cat([padded, IDS[1:]])
    found = written(sparse, ids, attention_mask=mask, cache_implementation=implementation)
    assert torch.equal(found[:1], expected)
    assert torch.equal(found[1:], written(sparse, IDS[1:]))


def test_a_new_prompt_chooses_anew(sparse):
    first, second = (decoded(sparse, IDS[row : row + 1], NEXT[:1]) for row in range(2))
    assert torch.equal(decoded(sparse, IDS[:1], NEXT[:1]), first)
    assert torch.equal(decoded(sparse, IDS[1:], NEXT[:1]), second)


def test_sequences_are_decoded_in_turns(sparse):
    expected = [decoded(sparse, IDS[row : row + 1], NEXT[:1, :2]) for row in range(2)]
    caches = [dynamic(sparse), dynamic(sparse)]
    for row, cache in enumerate(caches):
        fed(sparse, IDS[row : row + 1], cache)
    for place in range(2):
        for row, cache in enumerate(caches):
            logits = fed(sparse, NEXT[:1, place : place + 1], cache)
            torch.testing.assert_close(logits, expected[row][:, place : place + 1])


def test_a_prompt_in_pieces_is_one_prompt(sparse):
    whole, pieces = dynamic(sparse), dynamic(sparse)
    fed(sparse, IDS, whole)
    fed(sparse, IDS[:, :4], pieces)
    fed(sparse, IDS[:, 4:], pieces)
    assert torch.equal(sets_in(pieces), sets_in(whole))


def test_the_next_turn_of_a_chat_adds_to_the_scores(sparse):
    cache = dynamic(sparse)
    fed(sparse, IDS, cache)
    first = sets_in(cache).clone()
    fed(sparse, NEXT[:, :1], cache)
    scores = beside(cache)._sets[SITES[0]].scores.clone()
    fed(sparse, NEXT[:, 1:], cache)
    added = beside(cache)._sets[SITES[0]].scores - scores
    torch.testing.assert_close(added.sum(dim=1), torch.full((2,), 4.0).double())
    assert not torch.equal(sets_in(cache), first)
    fed(sparse, NEXT[:, :1], cache)


def test_a_copy_of_a_cache_has_the_sets(sparse):
    cache = dynamic(sparse)
    fed(sparse, IDS, cache)
    other = copy.deepcopy(cache)
    expected = fed(sparse, NEXT[:, :1], cache)
    assert torch.equal(fed(sparse, NEXT[:, :1], other), expected)


def test_sets_stay_where_they_are_for_the_next_prompt(sparse):
    cache = static(sparse)
    fed(sparse, IDS, cache)
    before, kept = sets_in(cache), beside(cache).active(SITES[0], torch.device("cpu"))
    cache.reset()
    fed(sparse, IDS.flip(1), cache)
    assert beside(cache).active(SITES[0], torch.device("cpu")) is kept
    assert not torch.equal(sets_in(cache), before)
    other = dynamic(sparse)
    fed(sparse, IDS.flip(1), other)
    assert torch.equal(sets_in(cache), sets_in(other))


@pytest.mark.parametrize("kind", [dynamic, static])
def test_without_a_prompt(kind, sparse):
    with pytest.raises(UnsupportedModelError, match=WITHOUT_PROMPT):
        fed(sparse, IDS[:, :1], kind(sparse))
    with pytest.raises(UnsupportedModelError, match=WITHOUT_PROMPT):
        written(sparse, IDS[:, :1])
    cache = kind(sparse)
    fed(sparse, IDS, cache)
    cache.reset()
    with pytest.raises(UnsupportedModelError, match=WITHOUT_PROMPT):
        fed(sparse, IDS[:, :1], cache)


def test_a_prompt_that_was_not_seen_whole(sparse):
    cache = dynamic(sparse)
    with running(sparse, "dense"):
        fed(sparse, IDS, cache)
    fed(sparse, NEXT, cache)
    with pytest.raises(UnsupportedModelError, match=WITHOUT_PROMPT):
        fed(sparse, NEXT[:, :1], cache)


def test_a_cache_that_another_model_filled_is_refused(llama_model):
    cache = dynamic(llama_model)
    fed(llama_model, IDS, cache)
    griffin(llama_model)
    with pytest.raises(UnsupportedModelError, match="cache holds tokens that the sparsified model has not computed"):
        fed(llama_model, NEXT[:, :1], cache)


@pytest.mark.parametrize(
    "kind, change",
    [
        (dynamic, lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
        (static, lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
        (dynamic, lambda cache: cache.crop(-3)),
        (static, lambda cache: cache.crop(-3)),
        (dynamic, lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    ],
    ids=["reordered", "reordered static", "cut", "cut static", "selected"],
)
def test_a_cache_that_was_changed_is_refused(kind, change, sparse):
    cache = kind(sparse)
    fed(sparse, IDS, cache)
    change(cache)
    with pytest.raises(UnsupportedModelError, match="put in another order, multiplied or cut"):
        fed(sparse, NEXT[: len(cache.layers[0].keys), :1], cache)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 14).long()])
def test_a_prompt_of_fewer_sequences_than_the_cache_saw_is_dense_and_then_refused(mask, llama_model):
    dense = fed(llama_model, torch.cat([IDS, NEXT], dim=1)[:1], dynamic(llama_model))
    griffin(llama_model)
    cache = dynamic(llama_model)
    fed(llama_model, IDS, cache)
    cache.batch_select_indices(torch.tensor([0]))
    torch.testing.assert_close(fed(llama_model, NEXT[:1], cache, attention_mask=mask), dense[:, 9:])
    with pytest.raises(UnsupportedModelError, match="put in another order, multiplied or cut"):
        fed(llama_model, NEXT[:1, :1], cache)


@pytest.mark.parametrize("other", [copy.deepcopy, lambda model: griffin(countdown.restore_(model), 0.9)])
def test_sets_are_those_of_the_model_that_chose_them(other, llama_model):
    griffin(llama_model)
    cache = dynamic(llama_model)
    fed(llama_model, IDS, cache)
    with pytest.raises(UnsupportedModelError, match="cache holds tokens that the sparsified model has not computed"):
        fed(other(llama_model), NEXT[:, :1], cache)


def test_beam_search_is_refused(sparse):
    with pytest.raises(UnsupportedModelError, match="as beam search does"):
        written(sparse, IDS, num_beams=3)


def square(*rows):
    """A mask `[1, 1, tokens, keys]` of ones and zeros, as booleans and as what is added to scores."""
    attends = torch.tensor(rows).bool()[None, None]
    return attends, torch.zeros(attends.shape).masked_fill(~attends, -torch.inf)


@pytest.mark.parametrize(
    "mask, past, expected",
    [
        (None, 0, None),
        ({"full_attention": None}, 0, None),
        (torch.tensor([[0, 1, 1], [1, 1, 1]]), 0, [[True, False, False], [False] * 3]),
        (torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]), 1, [[False] * 3, [True, False, False]]),
        *((mask, 0, [[True, False]] * 2) for mask in square([0, 0, 0], [0, 1, 0])),
        *((mask, 1, [[False, True]] * 2) for mask in square([1, 1, 0], [1, 1, 0])),
        ({"sliding_attention": square([1, 0], [1, 1])[0], "full_attention": None}, 0, [[False, False]] * 2),
    ],
)
def test_padding_is_what_no_token_attends_to(mask, past, expected):
    tokens = 2 if expected is None else len(expected[0])
    found = padding(mask, past, (2, tokens))
    assert (None if found is None else found.tolist()) == expected


def test_a_mask_that_does_not_tell_padding_is_refused(llama_model):
    griffin(llama_model)
    for mask in (object(), torch.ones(2, 3), torch.ones(2, 1, 9)):
        sequences = in_call(None, 2, 1)
        sequences.prompt(mask, 9, None)
        with pytest.raises(UnsupportedModelError, match="does not tell which tokens are padding"):
            sequences.active(SITES[0], torch.device("cpu"))


def test_all_tokens_are_refused_and_the_model_left_as_it_was(llama_model, tokenizer):
    profile = countdown.calibrate(llama_model, tokenizer, [], method("griffin"), progress=False)
    before = dict(llama_model.named_modules())
    with pytest.raises(ConfigError, match="griffin does not fit apply_to='all'"):
        countdown.sparsify_(llama_model, profile, apply_to="all")
    assert dict(llama_model.named_modules()) == before
    countdown.sparsify_(llama_model, profile)
    with pytest.raises(ConfigError, match="griffin does not fit apply_to='all'"), running(llama_model, "all"):
        pass


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decision": "threshold"}, "griffin does not offer decision 'threshold'"),
        ({"weighting": "rms"}, "weighting of griffin is 'rms'"),
        ({"allocation": "global"}, "allocation of griffin is 'global'"),
    ],
)
def test_what_it_does_not_offer(settings, message):
    with pytest.raises(ConfigError, match=message):
        method("griffin", **settings)


def test_threads_write_what_each_would_alone(llama_model):
    griffin(llama_model)
    prompts = [IDS[:1], IDS[1:, :5]]
    expected = [written(llama_model, ids).tolist() for ids in prompts]
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(lambda ids: written(llama_model, ids).tolist(), prompts)) == expected


@torch.no_grad()
def test_phases_in_one_call_are_what_decoding_gives(sparse):
    ids = torch.cat([IDS, NEXT], dim=1)
    now = torch.full(ids.shape, GENERATED, dtype=torch.uint8)
    now[:, :9] = PROMPT
    with phases(sparse, now.flatten()):
        found = sparse(ids, use_cache=False).logits
    torch.testing.assert_close(found[:, 9:], decoded(sparse, IDS, NEXT))
    assert {site.tokens for site in countdown.status(sparse)} == {2 * 5 * 2}


@torch.no_grad()
@pytest.mark.parametrize("order", [[GENERATED, PROMPT, GENERATED], [PROMPT, GENERATED, PROMPT], [GENERATED] * 3])
def test_phases_that_are_generated_before_their_prompt_are_refused(order, sparse):
    now = torch.tensor(order * 2, dtype=torch.uint8)
    with phases(sparse, now), pytest.raises(UnsupportedModelError, match="before the end of their prompt"):
        sparse(IDS[:, :3], use_cache=False)


@torch.no_grad()
def test_driven_tokens(sparse):
    expected = decoded(sparse, IDS, NEXT)
    cache = static(sparse)
    with phases(sparse, "prompt"):
        fed(sparse, IDS, cache)
    with phases(sparse, "generated"):
        found = torch.cat([fed(sparse, NEXT[:, place : place + 1], cache) for place in range(5)], dim=1)
    torch.testing.assert_close(found, expected)
    fed(sparse, NEXT[:, :1], cache)
    module = sparse_modules(sparse)[SITES[0]]
    with phases(sparse, "padding"):
        assert not module(torch.randn(2, 1, 24)).any()
    with phases(sparse, "generated"), pytest.raises(UnsupportedModelError, match=WITHOUT_PROMPT):
        module(torch.randn(2, 1, 24))
    with continuing(sparse, cache):
        x = torch.randn(2, 1, 24)
        assert torch.equal(module.active(x)[:, 0], sets_in(cache)[0])


@torch.no_grad()
@pytest.mark.parametrize("prompt_tokens", [1, 12, 29])
def test_one_call_scores_what_decoding_does(prompt_tokens, model):
    griffin(model, 0.6)
    windows = torch.randint(0, 250, (3, 32), generator=torch.Generator().manual_seed(1))
    whole, steps = (
        evaluate(model, windows, protocol=protocol, prompt_tokens=prompt_tokens, progress=False)
        for protocol in ("all", "decode")
    )
    assert whole.tokens == steps.tokens == 3 * (31 - prompt_tokens)
    assert whole.prompt_tokens == whole.record()["prompt_tokens"] == prompt_tokens
    for name in ("perplexity", "dense_perplexity", "kl", "top1"):
        assert getattr(whole, name) == pytest.approx(getattr(steps, name), rel=1e-4)
    assert whole.kl > 0
    assert whole.realised_sparsity == steps.realised_sparsity == pytest.approx(31 / 53)


def test_evaluating_without_a_prompt_is_refused(sparse):
    windows = torch.randint(0, 250, (1, 32))
    with pytest.raises(ConfigError, match=r"griffin does not fit apply_to='all'.*prompt_tokens"):
        evaluate(sparse, windows, progress=False)
    assert evaluate(sparse, windows, protocol="decode", progress=False).tokens == 15
    for tokens in (0, 31):
        with pytest.raises(ConfigError, match=f"prompt_tokens is {tokens}, expected 1 to 30"):
            evaluate(sparse, windows, prompt_tokens=tokens, progress=False)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_loops_keep_the_sets_of_their_prompts(family, tokenizer):
    model = griffin(FAMILIES[family]())
    expected = [written(model, IDS[row : row + 1])[0].tolist() for row in range(2)]
    loops = [DecodeLoop(model, IDS[row : row + 1], new_tokens=12) for row in range(2)]
    countdown.reset_counters(model)
    found: list[list[int]] = [[], []]
    for _ in range(4):
        for loop, tokens in zip(loops, found, strict=True):
            tokens.extend(loop.run(3).tolist())
        written(model, IDS.flip(1))
    assert found == expected
    assert {site.tokens for site in countdown.status(model)} == {2 * 11 + 4 * 2 * 11}
    assert generate(model, tokenizer, IDS[:1], max_new_tokens=12).by == "decode loop"
    with pytest.raises(UnsupportedModelError, match=WITHOUT_PROMPT):
        DecodeLoop(model, IDS[:1, :1], new_tokens=3)


@torch.no_grad()
def test_a_step_compiles_as_one_graph():
    model = griffin(llama())
    expected = decoded(model, IDS, NEXT)
    cache = static(model)
    fed(model, IDS, cache)
    step = torch.compile(lambda ids: fed(model, ids, cache), backend="eager", fullgraph=True)
    with continuing(model, cache):
        found = torch.cat([step(NEXT[:, place : place + 1]) for place in range(5)], dim=1)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_compiled_model_writes_the_same():
    model = griffin(llama())
    expected = decoded(model, IDS, NEXT)
    cache, compiled = dynamic(model), torch.compile(model, backend="eager")
    given = cache_argument(model, cache)
    compiled(IDS, **given, use_cache=True)
    found = [compiled(NEXT[:, place : place + 1], **given, use_cache=True).logits for place in range(5)]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_sets_that_were_chosen_in_inference_mode_are_renewed_outside(inside, sparse):
    cache = dynamic(sparse)
    with inside():
        fed(sparse, IDS, cache)
    fed(sparse, NEXT, cache)
    assert sets_in(cache).shape == (3, 2, 53)


def test_restoring_gives_the_dense_model_and_sparsifying_again_works(model):
    dense = decoded(model, IDS, NEXT)
    griffin(model)
    sparse = decoded(model, IDS, NEXT)
    assert not torch.allclose(sparse, dense)
    countdown.restore_(model)
    assert torch.equal(decoded(model, IDS, NEXT), dense)
    torch.testing.assert_close(decoded(griffin(model), IDS, NEXT), sparse)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_choose_for_themselves(copied, sparse):
    expected = decoded(sparse, IDS, NEXT)
    cache = dynamic(sparse)
    fed(sparse, IDS, cache)
    other = copied(sparse)
    torch.testing.assert_close(decoded(other, IDS, NEXT), expected)
    assert beside(cache) is not None
    assert {site.tokens for site in countdown.status(other)} == {2 * 5 * 2}


def test_casts(llama_model):
    griffin(llama_model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        llama_model.to(dtype)
        assert decoded(llama_model, IDS, NEXT).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoded(llama_model, IDS, NEXT).isfinite().all()


def test_calibration_reads_no_text(llama_model, tokenizer, tmp_path):
    calls = []
    llama_model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    profile = countdown.calibrate(llama_model, tokenizer, [], method("griffin", sparsity=0.4), progress=False)
    assert not calls
    assert (profile.calibration["texts"], profile.calibration["tokens"]) == ([], 0)
    loaded = countdown.Profile.load(profile.save(tmp_path / "profile"))
    assert loaded.recipe == profile.recipe
    countdown.sparsify_(llama_model, loaded, sparsity=0.6)
    assert countdown.status(llama_model)[0].target_sparsity == 0.6


def test_a_saved_model_chooses_again(model_folder, tokenizer, tmp_path):
    model = countdown.from_pretrained(str(model_folder), device="cpu")
    griffin(model)
    expected = decoded(model, IDS, NEXT)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        decoded(countdown.from_pretrained(str(tmp_path / "saved"), device="cpu"), IDS, NEXT), expected
    )
    countdown.restore_(model)
    profile = countdown.calibrate(model, tokenizer, [], method("griffin"), progress=False)
    folder = countdown.export(str(model_folder), profile, tmp_path / "exported")
    torch.testing.assert_close(decoded(countdown.from_pretrained(str(folder), device="cpu"), IDS, NEXT), expected)
