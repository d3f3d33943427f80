"""Tasks through lm-eval: paired scores, the proof that sparse was sparse, and local task files. No hub."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import manager
from lm_eval.utils import get_rolling_token_windows

import countdown
from countdown.errors import ConfigError, CountdownError, UnsupportedModelError
from countdown.evaluation.evaluate import evaluate
from countdown.integrations.lm_eval import (
    HFLM,
    CountdownLM,
    Scored,
    compared,
    content_hash,
    evaluate_tasks,
    load_tasks,
    score_tasks,
)
from countdown.methods import method
from countdown.modules import running, sparse_modules
from countdown.sparsify import status
from tiny import byte_tokenizer, llama

DOCUMENTS = [
    {"goal": "open the door", "sol1": "turn the knob", "sol2": "eat the knob", "label": 0},
    {"goal": "boil an egg", "sol1": "freeze some water and wait for a while", "sol2": "heat it", "label": 1},
    {"goal": "x", "sol1": "a", "sol2": "b", "label": 0},
    {"goal": "write a letter to the editor", "sol1": "use a pen", "sol2": "use a spoon, or two of them", "label": 0},
    {"goal": "dry", "sol1": "rain", "sol2": "sun", "label": 1},
    {"goal": "sleep well", "sol1": "lie down in the dark", "sol2": "run", "label": 0},
]
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{goal}} {{sol1}} {{sol2}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
WRITING = """
task: writing
output_type: generate_until
doc_to_text: "{{goal}}"
doc_to_target: "{{sol1}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
    for task in (CHOICE, ROLLING, WRITING):
        (folder / f"{task.split()[1]}.yaml").write_text(task + source)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """What datasets converts goes to a folder of the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def speaker():
    """A tokenizer with EOS, which lm-eval needs for tasks that generate."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<bos>"
    return tokenizer


@pytest.fixture
def sparse(llama_model, speaker, text):
    profile = countdown.calibrate(
        llama_model, speaker, text, method("m-countdown", sparsity=0.6), tokens=512, progress=False
    )
    return countdown.sparsify_(llama_model, profile)


def scored(model, tokenizer, task, **settings):
    return evaluate_tasks(model, tokenizer, [task], progress=False, **settings)


@torch.no_grad()
def likelihoods(model, tokenizer, mode):
    """Log-likelihood of each answer of each document, by the definition."""
    rows = []
    for document in DOCUMENTS:
        start = tokenizer(f"Question: {document['goal']}\nAnswer:")["input_ids"]
        row = []
        for answer in (document["sol1"], document["sol2"]):
            new = tokenizer(f" {answer}")["input_ids"]
            with running(model, mode):
                logits = model(torch.tensor([start + new])).logits[0].log_softmax(-1)
            row.append(sum(logits[len(start) - 1 + place, token].item() for place, token in enumerate(new)))
        rows.append(row)
    return rows


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_by_definition_dense_and_sparse(batch_size, sparse, speaker, folder):
    (task,) = load_tasks(["choice"], folder)
    result = scored(sparse, speaker, task, batch_size=batch_size)
    accuracy, _ = result.scores
    right = {
        mode: [
            (row[1] > row[0]) == bool(document["label"])
            for row, document in zip(likelihoods(sparse, speaker, mode), DOCUMENTS, strict=True)
        ]
        for mode in ("dense", "all")
    }
    assert (accuracy.task, accuracy.metric, accuracy.documents) == ("choice", "acc", len(DOCUMENTS))
    assert accuracy.dense == pytest.approx(sum(right["dense"]) / len(DOCUMENTS))
    assert accuracy.sparse == pytest.approx(sum(right["all"]) / len(DOCUMENTS))
    assert accuracy.difference == pytest.approx(accuracy.sparse - accuracy.dense)
    assert accuracy.low <= accuracy.difference <= accuracy.high
    assert 0.4 < result.realised_sparsity < 0.8


def test_batches_change_no_score_and_padding_is_counted(sparse, speaker, folder):
    (task,) = load_tasks(["choice"], folder)
    answers, fed = [], []
    for batch_size in (1, 5):
        lm = CountdownLM(sparse, speaker, batch_size=batch_size, progress=False)
        task.build_all_requests()
        answers.append([likelihood for likelihood, _ in lm.loglikelihood(task.instances)])
        fed.append(lm.fed)
        assert {site.tokens for site in status(sparse)} == {lm.fed}
    assert answers[0] == pytest.approx(answers[1], rel=1e-4)
    assert fed[1] > fed[0]


def test_dense_is_lm_evals_own_model_to_the_bit(on_reference, sparse, speaker, folder):
    (task,) = load_tasks(["choice"], folder)
    dense = score_tasks(CountdownLM(sparse, speaker, mode="dense", progress=False), [task])
    assert {site.tokens for site in status(sparse)} == {0}
    plain = score_tasks(HFLM(llama(), tokenizer=byte_tokenizer()), [task])
    assert dense == plain
    assert countdown.restore_(sparse)


def test_perplexity_is_that_of_lm_eval(sparse, speaker, folder):
    (task,) = load_tasks(["rolling"], folder)
    lm = CountdownLM(sparse, speaker, mode="dense", max_length=8, progress=False)
    likelihood, size = score_tasks(lm, [task])["rolling", "byte_perplexity", "none"].by_document[0]
    tokens = speaker(" ".join(list(DOCUMENTS[0].values())[:3]))["input_ids"]
    assert len(tokens) == size == 5 * 8
    rolling = get_rolling_token_windows(tokens, speaker.bos_token_id, max_seq_len=8, context_len=1)
    # `evaluate` feeds a window whole and scores all of its tokens but the first.
    found = evaluate(sparse, torch.tensor([given + predicted[-1:] for given, predicted in rolling]), progress=False)
    assert found.tokens == len(tokens)
    assert math.exp(-likelihood / len(tokens)) == pytest.approx(found.dense_perplexity, rel=1e-4)


def test_a_perplexity_has_no_interval(sparse, speaker, folder):
    (task,) = load_tasks(["rolling"], folder)
    (score,) = scored(sparse, speaker, task).scores
    assert score.metric == "byte_perplexity"
    assert score.sparse != score.dense
    assert (score.low, score.high) == (None, None)
    assert (score.dense_stderr, score.sparse_stderr) == (None, None)


@pytest.mark.parametrize("protocol", ["all", "decode"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tasks_that_generate(protocol, batch_size, sparse, speaker, folder):
    """The document 'x' is a prompt of a single token, which counts as generated."""
    (task,) = load_tasks(["writing"], folder)
    result = scored(sparse, speaker, task, protocol=protocol, batch_size=batch_size)
    assert [score.metric for score in result.scores] == ["exact_match"]
    generated = (6 - 1) * len(DOCUMENTS)
    prompts = sum(len(document["goal"]) for document in DOCUMENTS)
    if batch_size == 1:
        assert result.tokens == generated + (prompts if protocol == "all" else 1)
    else:
        assert result.tokens >= generated


def test_the_model_and_the_tokenizer_are_left_as_they_were(sparse, tokenizer, folder):
    (task,) = load_tasks(["choice"], folder)
    scored(sparse, tokenizer, task, limit=2)
    assert tokenizer.pad_token is None
    assert {(m.apply_to, m.forced_dense) for m in sparse_modules(sparse).values()} == {("decode", False)}
    assert not sparse.training


@pytest.mark.parametrize("task", ["choice", "rolling", "writing"])
def test_a_layer_that_stays_dense_is_noticed(task, sparse, speaker, folder):
    module = sparse_modules(sparse)["model.layers.1.mlp"]
    module.forward = module.dense.forward
    with pytest.raises(CountdownError, match=r"model\.layers\.1\.mlp computed 0 tokens sparsely, expected"):
        scored(sparse, speaker, load_tasks([task], folder)[0])


def test_logits_that_are_not_finite_are_no_answer(sparse, speaker, folder):
    (task,) = load_tasks(["choice"], folder)
    with torch.no_grad():
        sparse.lm_head.weight[3] = torch.nan
    with pytest.raises(CountdownError, match=r"model run dense are not finite: lm_head\.weight holds NaN"):
        scored(sparse, speaker, task)


def test_who_drives_lm_eval_from_python(sparse, speaker, folder):
    (task,) = load_tasks(["choice"], folder)
    lm, none = CountdownLM(sparse, speaker, progress=False), manager.TaskManager(include_defaults=False)
    results = simple_evaluate(lm, tasks=[task], limit=3, bootstrap_iters=0, task_manager=none)
    found = score_tasks(CountdownLM(sparse, speaker, progress=False), [task], limit=3)
    assert results["results"]["choice"]["acc,none"] == found["choice", "acc", "none"].value
    assert len(results["samples"]["choice"]) == 3


def test_few_shot_examples_are_the_same_in_both_runs(sparse, speaker, folder, tmp_path):
    few = (folder / "choice.yaml").read_text().replace("task: choice", "task: few\nnum_fewshot: 2\nfewshot_split: test")
    (tmp_path / "few.yaml").write_text(few)
    (task,) = load_tasks(["few"], tmp_path)
    seen = []
    for _ in range(2):
        score_tasks(CountdownLM(sparse, speaker, progress=False), [task])
        seen.append([instance.args for instance in task.instances])
    assert seen[0] == seen[1]
    assert seen[0][0][0].count("Question:") == 3


def test_pairs_make_the_interval():
    key = ("task", "acc", "none")
    before, after = [1, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 1]
    (score,) = compared({key: Scored(4 / 6, before)}, {key: Scored(0.5, after)})
    # Differences 0, -1, 0, 0, -1, 1: mean -1/6, s 0.7528, t 2.571 with 5 degrees of freedom.
    assert score.difference == pytest.approx(-1 / 6)
    assert (score.low, score.high) == pytest.approx((-1 / 6 - 0.790, -1 / 6 + 0.790), abs=0.003)
    # s of the values is 0.5164 and 0.5477.
    assert (score.dense_stderr, score.sparse_stderr) == pytest.approx((0.5164 / 6**0.5, 0.5477 / 6**0.5), abs=1e-4)


def test_the_hash_of_a_task_is_of_its_documents_settings_and_examples(folder, tmp_path):
    def hashed(*changes: tuple[str, str], limit=None) -> str:
        file = (folder / "choice.yaml").read_text()
        for old, new in changes:
            assert old in file
            file = file.replace(old, new)
        (tmp_path / "choice.yaml").write_text(file)
        return content_hash(load_tasks(["choice"], tmp_path)[0], limit)

    shots = ("task: choice", "task: choice\nnum_fewshot: 1\nfewshot_split: test")
    same = hashed()
    assert hashed() == same
    assert len({same, hashed(limit=2), hashed(("Question", "Ask")), hashed(shots)}) == 4


def test_a_task_with_functions_is_the_same_one_in_every_process():
    class Task:
        def __init__(self, *functions):
            self._functions = functions

        def dump_config(self):
            return {"filters": self._functions}

        def get_config(self, _):
            return 0

        eval_docs = ({"question": "?"},)

    def made():
        def first(text):
            return text[:1]

        return first, functools.partial(first, text="a")

    assert content_hash(Task(*made())) == content_hash(Task(*made()))
    assert content_hash(Task(made()[0])) != content_hash(Task(made()[1]))


def test_a_task_may_be_a_path(folder):
    (task,) = load_tasks([str(folder / "choice.yaml")])
    assert task.task_name == "choice"


MISTAKES = {
    "unknown": (["chioce"], "task 'chioce' is not found.* Did you mean 'choice'.*--tasks-dir"),
    "broken": (["broken"], r"broken\.yaml is not YAML"),
    "field": (["field"], "task field cannot be loaded.*doc_to_txt"),
    "no data": (["nodata"], "data of task nodata are not found"),
    "not a mapping": (["{folder}/list.yaml"], "cannot be loaded"),
    "empty": (["choice", " "], "give names of tasks"),
    "hub": (["hub"], "on the Hugging Face hub, which cannot be reached"),
}


@pytest.mark.parametrize("names, message", MISTAKES.values(), ids=MISTAKES)
def test_tasks_that_cannot_be_had(names, message, folder, tmp_path, monkeypatch):
    # To read the thousands of tasks that lm-eval ships takes seconds, and none of them matters here.
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "shipped" / "manager.py"))
    choice = (folder / "choice.yaml").read_text()
    (tmp_path / "choice.yaml").write_text(choice)
    (tmp_path / "broken.yaml").write_text("task: broken\nmetric_list: [")
    (tmp_path / "field.yaml").write_text(choice.replace("task: choice", "task: field\ndoc_to_txt: x"))
    (tmp_path / "nodata.yaml").write_text(choice.replace("choice\n", "nodata\n", 1).replace(".jsonl", ".nope"))
    (tmp_path / "hub.yaml").write_text("task: hub\ndataset_path: nobody/nothing\noutput_type: multiple_choice\n")
    (tmp_path / "list.yaml").write_text("- task: list\n")
    with pytest.raises(ConfigError, match=message):
        load_tasks([name.format(folder=tmp_path) for name in names], tmp_path)


def test_bad_input(sparse, speaker, folder):
    (task,) = load_tasks(["choice"], folder)
    with pytest.raises(ConfigError, match="limit is 0, expected at least 1"):
        scored(sparse, speaker, task, limit=0)
    with pytest.raises(ConfigError, match="batch_size is 0, expected at least 1"):
        scored(sparse, speaker, task, batch_size=0)
    with pytest.raises(ConfigError, match=r"choice scores given text.*protocol 'all' fits"):
        scored(sparse, speaker, task, protocol="decode")
    with pytest.raises(ConfigError, match="mode is 'sparse'"):
        CountdownLM(sparse, speaker, mode="sparse")
    with pytest.raises(ConfigError, match="which 'decode' leaves dense"):
        CountdownLM(sparse, speaker, mode="decode").loglikelihood([])
    with pytest.raises(UnsupportedModelError, match="is not sparsified"):
        CountdownLM(llama(), speaker)
    with pytest.raises(ConfigError, match="folder of tasks nope does not exist"):
        load_tasks(["choice"], "nope")


def test_without_lm_eval_the_remedy_is_said():
    code = "import sys; sys.modules['lm_eval'] = None; import countdown.integrations.lm_eval"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'countdown-llm[eval]'" in run.stderr.splitlines()[-1]
