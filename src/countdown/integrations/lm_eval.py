"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), dense and sparse on one and the same model.

    tasks = load_tasks(["piqa"])
    found = evaluate_tasks(model, tokenizer, tasks, limit=200)   # a model that sparsify_ made

lm-eval has no plug-in for models. Who drives it from Python gives it a `CountdownLM`:

    results = lm_eval.simple_evaluate(CountdownLM(model, tokenizer), tasks=["piqa"])
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from countdown.config import check_choice, suggestion
from countdown.errors import ConfigError, CountdownError
from countdown.evaluation.evaluate import PROTOCOLS, check_sparse, overall
from countdown.evaluation.intervals import mean_interval, standard_error
from countdown.finite import not_finite
from countdown.modules import running, sparse_modules
from countdown.sparsify import reset_counters, status

try:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(f"tasks need lm-eval ({error}): pip install 'countdown-llm[eval]'.") from error

MODES = ("dense", *PROTOCOLS)
# lm-eval's own.
FEWSHOT_SEED = 1234
GENERATION = "generate_until"  # lm-eval's name of tasks whose answers are generated; all others score given text
HELP = "docs/evaluation.md says how to add a task with files of your own"


class CountdownLM(HFLM):  # type: ignore[misc]
    """A loaded model as lm-eval wants it, run dense or sparse, with proof that sparse was sparse.

    Every request of lm-eval ends with a comparison: each sparse module must have counted exactly the tokens that were
    fed, the padding of batches among them, or none when the model runs dense. Padding is at the right of what is
    scored, so no scored token sees it, and a token's active set depends on the token alone: batches change no score
    but by rounding.

    Args:
        model: A sparsified model; dense ones only for `mode="dense"`. It is left as it was.
        tokenizer: Its tokenizer; a copy is used, as lm-eval may give it a padding token.
        mode: `dense`; `all`: every token sparse; `decode`: prompts dense and generated tokens sparse, for tasks that
            generate. Log-likelihoods are computed in one call, as prompts are: they need `all`.
        batch_size: Sequences in a call, or lm-eval's `auto`.
        progress: Show lm-eval's bars on stderr.
        more: Whatever else `HFLM` takes: `max_length`, or `softmax_dtype="float32"`. By default, as in lm-eval, the
            log-probabilities of a bfloat16 model are rounded and summed in bfloat16, so that answers often tie.

    Raises:
        UnsupportedModelError: The model is not sparsified, in a mode that is not dense.
        ConfigError: Unknown mode.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        mode: str = "all",
        batch_size: int | str = 1,
        progress: bool = True,
        **more: Any,
    ) -> None:
        check_choice("mode", mode, MODES)
        self.mode, self.progress, self.fed = mode, progress, 0
        if mode != "dense":
            status(model)
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, **more)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._check_scored()
        with self._counted():
            return super().loglikelihood(requests, disable_tqdm or not self.progress)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._check_scored()
        with self._counted():
            return super().loglikelihood_rolling(requests, disable_tqdm or not self.progress)  # type: ignore[no-any-return]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self._counted():
            return super().generate_until(requests, disable_tqdm or not self.progress)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **more: Any) -> list[Any]:
        # Rolling log-likelihoods ask for a bar in any case.
        quiet = disable_tqdm or not self.progress
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, **more)  # type: ignore[no-any-return]

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.fed += inps.numel()
        with running(self.model, self.mode):
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
        if not bool((logits < torch.inf).all()):  # an answer would be picked all the same
            raise not_finite(f"the logits of the model run {self.mode} are", self.model)
        return logits

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with running(self.model, self.mode):
            tokens: Tensor = super()._model_generate(context, *args, **kwargs)
        sequences, length = context.shape
        # The last new token is not fed. A prompt of one token counts as generated, see `SparseModule`.
        self.fed += sequences * (tokens.shape[1] - length - 1)
        if self.mode == "all" or length == 1:
            self.fed += context.numel()
        return tokens

    def _check_scored(self) -> None:
        if self.mode == "decode":
            raise ConfigError(
                "log-likelihoods are computed as prompts are, which 'decode' leaves dense: take 'all', or tasks that "
                "generate."
            )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Within the context, what is computed sparsely must be what is fed."""
        if not sparse_modules(self.model):
            yield
            return
        reset_counters(self.model)
        self.fed = 0
        yield
        check_sparse(status(self.model), 0 if self.mode == "dense" else self.fed)


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task, dense and sparse on the same documents.

    Args:
        task, metric: As lm-eval names them.
        filter: What lm-eval did to the answers first; `none` for most tasks.
        documents: How many were scored.
        dense, sparse: The metric.
        dense_stderr, sparse_stderr: Their standard errors, s/√n over documents. None for metrics that are not means
            over documents, as perplexity, and for a single document.
        difference: sparse − dense.
        low, high: Confidence interval of the difference at 95%, Student's t over the differences by document. None
            for metrics that are not means over documents, and for fewer than three documents.
    """

    task: str
    metric: str
    filter: str
    documents: int
    dense: float
    sparse: float
    dense_stderr: float | None
    sparse_stderr: float | None
    difference: float
    low: float | None
    high: float | None

    @property
    def name(self) -> str:
        """The metric, and the filter where there is one: `acc`, `exact_match, strict-match`."""
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"


@dataclass(frozen=True)
class TaskEvaluation:
    """What sparsity costs on tasks.

    Args:
        protocol: `all`: every token sparse. `decode`: prompts dense, generated tokens sparse.
        scores: By task and metric.
        tokens: Tokens fed and computed sparsely, the padding of batches included.
        realised_sparsity, weights_read: Over these tokens, as in `evaluation.evaluate.Evaluation`.
    """

    protocol: str
    scores: list[TaskScore]
    tokens: int
    realised_sparsity: float
    weights_read: float

    def records(self) -> list[dict[str, Any]]:
        """Return a flat record for each score, as results files hold them."""
        shared = asdict(self)
        del shared["scores"]
        shared["apply_to"] = shared.pop("protocol")
        return [asdict(score) | shared for score in self.scores]


@dataclass(frozen=True)
class Scored:
    """A metric of a task in one run: as lm-eval aggregates it, and by document."""

    value: float
    by_document: list[Any]

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean of its values by document; perplexities and BLEU are not."""
        try:
            values = [float(value) for value in self.by_document]
        except (TypeError, ValueError):
            return False
        return math.isclose(fmean(values), self.value, rel_tol=1e-9, abs_tol=1e-12)

    @property
    def stderr(self) -> float | None:
        """Its standard error; None unless it is a mean over several documents."""
        return standard_error([float(value) for value in self.by_document]) if self.is_mean else None


# By task, metric and filter.
Scores = dict[tuple[str, str, str], Scored]


def load_tasks(names: Sequence[str], tasks_dir: str | Path | None = None) -> list[Any]:
    """Return tasks of lm-eval, with their data.

    Args:
        names: Tasks, groups or tags of lm-eval, or of `tasks_dir`, or paths of task files.
        tasks_dir: A folder with task files (YAML) of your own; they come before lm-eval's.

    Raises:
        ConfigError: No such task, a file that is not one, or data that cannot be had.
    """
    names = [name.strip() for name in names]
    if not all(names) or not names:
        raise ConfigError("give names of tasks, separated by commas, such as piqa,arc_easy.")
    if tasks_dir is not None and not Path(tasks_dir).is_dir():
        raise ConfigError(f"the folder of tasks {tasks_dir} does not exist.")
    manager = _manager(names, tasks_dir)
    found: dict[str, Any] = {}
    for name in names:
        found |= _load(manager, name, tasks_dir)
    return list(found.values())


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    protocol: str = "all",
    limit: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> TaskEvaluation:
    """Score tasks with a sparsified model run dense and run sparse, and compare document by document.

    Args:
        model: A sparsified model; left as it was.
        tokenizer: Its tokenizer.
        tasks: From `load_tasks`.
        protocol: `all`, or `decode` for tasks that generate.
        limit: Only the first so many documents of each task.
        batch_size, progress: See `CountdownLM`.

    Raises:
        UnsupportedModelError: The model is not sparsified.
        ConfigError: A protocol that does not fit a task, a limit or batch size below 1, or a task that fails.
        CountdownError: Some token was not computed sparsely in some layer.
    """
    check_protocol(tasks, protocol)
    check_counts(limit, batch_size)
    dense, sparse = (
        score_tasks(CountdownLM(model, tokenizer, mode=mode, batch_size=batch_size, progress=progress), tasks, limit)
        for mode in ("dense", protocol)
    )
    sites = status(model)
    realised, read = overall(sites)
    return TaskEvaluation(protocol, compared(dense, sparse), sites[0].tokens, realised, read)


def check_protocol(tasks: Sequence[Any], protocol: str) -> None:
    """Raise ConfigError unless every scored token of these tasks is sparse under `protocol`."""
    check_choice("protocol", protocol, PROTOCOLS)
    scored = [task.task_name for task in tasks if task.OUTPUT_TYPE != GENERATION]
    if protocol == "decode" and scored:
        raise ConfigError(
            f"task {scored[0]} scores given text, which is prompt and stays dense under 'decode'; protocol 'all' fits."
        )


def check_counts(limit: int | None, batch_size: int = 1) -> None:
    """Raise ConfigError for a limit or a batch size below 1."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1 document.")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1 sequence.")


def content_hash(task: Any, limit: int | None = None) -> str:
    """Return a hash of what a task asks: its settings, its first `limit` documents (or all), and its examples."""
    examples = task.fewshot_docs() if task.get_config("num_fewshot") else []
    content = [task.dump_config(), list(islice(task.eval_docs, limit)), list(examples)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_described).encode()).hexdigest()


def _described(value: Any) -> str:
    """Return what says the same in every process of a value that JSON has no form for."""
    if isinstance(value, functools.partial):
        return f"{_described(value.func)} {value.args} {sorted(value.keywords.items())}"
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def score_tasks(lm: HFLM, tasks: Sequence[Any], limit: int | None = None) -> Scores:
    """Return what a model of lm-eval scores on tasks: on the first `limit` documents, or on all.

    Raises:
        ConfigError: A limit below 1, or a task that fails.
    """
    check_counts(limit)
    by_name = {task.task_name: _prepared(task) for task in tasks}
    try:
        results = evaluate(lm, {"tasks": by_name}, limit=limit, bootstrap_iters=0, log_samples=True)
    except CountdownError:
        raise
    except (ValueError, KeyError, TypeError) as error:  # what lm-eval raises for what a task asks of it
        raise ConfigError(f"lm-eval cannot run {', '.join(by_name)}: {_said(error)}") from error
    found: Scores = {}
    for task, samples in results["samples"].items():
        found |= _scores(task, results["results"][task], samples)
    return found


def _prepared(task: Any) -> Any:
    """Return a task with few-shot settings as lm-eval's `simple_evaluate` makes them.

    That function itself spends seconds on a description of the machine.
    """
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    # Before each run: two runs must draw the same examples.
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


def _scores(task: str, aggregates: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Scores:
    """Return the metrics among the results of a task, which lm-eval keys by "metric,filter"."""
    found: Scores = {}
    for key, value in aggregates.items():
        metric, comma, name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            by_document = [sample[metric] for sample in samples if sample["filter"] == name]
            found[task, metric, name] = Scored(float(value), by_document)
    return found


def compared(dense: Scores, sparse: Scores) -> list[TaskScore]:
    """Return the metrics of two runs over the same documents, paired."""
    return [_paired(key, dense[key], sparse[key]) for key in sparse]


def _paired(key: tuple[str, str, str], dense: Scored, sparse: Scored) -> TaskScore:
    low, high = _difference_interval(dense, sparse)
    return TaskScore(
        *key,
        documents=len(sparse.by_document),
        dense=dense.value,
        sparse=sparse.value,
        dense_stderr=dense.stderr,
        sparse_stderr=sparse.stderr,
        difference=sparse.value - dense.value,
        low=low,
        high=high,
    )


def _difference_interval(dense: Scored, sparse: Scored) -> tuple[float | None, float | None]:
    if not (dense.is_mean and sparse.is_mean):
        return None, None
    pairs = zip(dense.by_document, sparse.by_document, strict=True)
    interval = mean_interval([float(after) - float(before) for before, after in pairs])
    return interval.low, interval.high


def _manager(names: Sequence[str], tasks_dir: str | Path | None) -> Any:
    """Return lm-eval's index of tasks, the thousands that it ships only where one of them is wanted."""
    folder = None if tasks_dir is None else str(tasks_dir)
    own = TaskManager(include_path=folder, include_defaults=False)
    return own if all(_known(own, name) for name in names) else TaskManager(include_path=folder)


def _known(manager: Any, name: str) -> bool:
    return name in manager.task_index or Path(name).is_file()


def _load(manager: Any, name: str, tasks_dir: str | Path | None) -> dict[str, Any]:
    if not _known(manager, name):
        broken = "" if tasks_dir is None else _broken(Path(tasks_dir))
        near = suggestion(name, manager.all_tasks)
        raise ConfigError(f"task '{name}' is not found{broken}.{near} Local ones go by --tasks-dir DIR: {HELP}.")
    try:
        return dict(manager.load([name])["tasks"])
    except ConnectionError as error:
        raise ConfigError(
            f"the data of task {name} are on the Hugging Face hub, which cannot be reached ({_said(error)}). Without "
            f"it, tasks work whose data are local files or in the hub's cache: {HELP}."
        ) from error
    except FileNotFoundError as error:
        raise ConfigError(
            f"the data of task {name} are not found: {_said(error)}. Relative data_files start at the current folder."
        ) from error
    except Exception as error:  # whatever the task's files make lm-eval, datasets or jinja raise
        raise ConfigError(f"task {name} cannot be loaded: {_said(error)}; {HELP}.") from error


def _broken(folder: Path) -> str:
    """Return which files of a folder are no YAML, which lm-eval passes over in silence."""
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            return f", and {path} is not YAML ({_said(error)})"
    return ""


def _said(error: BaseException) -> str:
    """Return what went wrong in the first place, on one line: datasets wraps what it meets."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
