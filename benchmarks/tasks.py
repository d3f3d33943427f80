"""What sparsity costs on tasks of lm-eval: PIQA, every FFN method, dense and sparse on the same documents.

    PIQA_DIR=DIR TEXT_DIR=DIR python benchmarks/tasks.py MODEL --limit 1000 --output benchmarks/results/NAME.json

Calibrates on 16,384 tokens of WikiText-2's validation split. MODEL is a hub id, folder or GGUF file; benchmarks/tasks/
says what the two folders hold. Two checks come first: accuracies of lm-eval's own HFLM against ours, dense, and
perplexity of WikiText-2's first windows by lm-eval's rolling log-likelihood against `evaluate`.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from torch import nn

from countdown.calibration.calibrate import calibrate
from countdown.evaluation.evaluate import evaluate, overall
from countdown.integrations.lm_eval import HFLM, CountdownLM, Scores, compared, load_tasks, score_tasks
from countdown.loading import Source, load_model, load_tokenizer
from countdown.methods import Method, method, method_class, method_names
from countdown.results import meta, write
from countdown.sparsify import restore_, sparsify_, status
from countdown.text import WINDOW, load_text, windows
from documents import commit

SPARSITIES = (0.5, 0.7)
TOKENS = 16384
BATCH = 8
WINDOWS = 16
FOLDER = Path(__file__).parent / "tasks"


def main() -> None:
    """Run everything and write the results file."""
    arguments = _arguments()
    bench = Bench.of(arguments)
    public = [bench.source.label, "--limit", str(arguments.limit)]
    header = meta(
        shlex.join(["python", "benchmarks/tasks.py", *public]),
        commit=arguments.commit or commit(),
        tokens=TOKENS,
        batch_size=BATCH,
        lm_eval=version("lm-eval"),
    )
    records = []
    for record in bench.records():
        records.append(record)
        print(*record.values(), flush=True)
        # Each time: a run that is cut short has what it measured.
        write(arguments.output, {"meta": header, "records": records})


@dataclass(frozen=True)
class Bench:
    """A model, its tasks, and how much of them is scored."""

    source: Source
    model: nn.Module
    tokenizer: Any
    tasks: list[Any]
    limit: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Bench:
        """Load what the arguments name."""
        source = Source.parse(arguments.model)
        tasks = load_tasks(["piqa"], FOLDER)
        model = load_model(source, dtype="bfloat16", device=arguments.device)
        return cls(source, model, load_tokenizer(source), tasks, arguments.limit)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the checks, then every method at every sparsity."""
        about = {"model": self.source.label, "dtype": "bfloat16", "device": str(next(self.model.parameters()).device)}
        dense = self.scored("dense")
        for record in (*self.against_lm_eval(dense), self.perplexities()):
            yield about | record
        for config in _configs():
            for record in self.sparse(config, dense):
                yield about | record

    def scored(self, mode: str) -> Scores:
        """Return the scores of the model run so."""
        return score_tasks(CountdownLM(self.model, self.tokenizer, mode=mode, batch_size=BATCH), self.tasks, self.limit)

    def against_lm_eval(self, dense: Scores) -> Iterator[dict[str, Any]]:
        """Yield the dense metrics, lm-eval's own beside them, and with log-probabilities in float32."""
        plain = score_tasks(HFLM(self.model, tokenizer=self.tokenizer, batch_size=BATCH), self.tasks, self.limit)
        exact = CountdownLM(self.model, self.tokenizer, mode="dense", batch_size=BATCH, softmax_dtype="float32")
        precise = score_tasks(exact, self.tasks, self.limit)
        for (task, metric, _), found in dense.items():
            values = {"dense": found, "lm_eval": plain[task, metric, "none"], "float32": precise[task, metric, "none"]}
            shown = {name: scored.value for name, scored in values.items()}
            yield {"run": "dense", "task": task, "metric": metric, "documents": len(found.by_document), **shown}

    def perplexities(self) -> dict[str, Any]:
        """Return the dense perplexity of one text by `evaluate`, and by lm-eval with windows as long."""
        test = load_text("wikitext2", "evaluation", text_dir=os.environ["TEXT_DIR"])
        ids = windows(self.tokenizer, test.content, count=WINDOWS)
        text = self.tokenizer.decode(ids.flatten())
        # An input of lm-eval's is a window without its last token, which `evaluate` feeds but does not score.
        settings: dict[str, Any] = {"max_length": WINDOW - 1, "softmax_dtype": "float32"}
        lm = HFLM(self.model, tokenizer=self.tokenizer, batch_size=1, **settings)
        (likelihood,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        sparsify_(self.model, self.calibrated(method(method_names()[0]), tokens=WINDOW))
        found = evaluate(self.model, ids, progress=False)
        restore_(self.model)
        return {
            "run": "perplexity",
            "text": test.source,
            "tokens": found.tokens,
            "dense_perplexity": found.dense_perplexity,
            "lm_eval": math.exp(-likelihood / len(self.tokenizer(text)["input_ids"])),
        }

    def sparse(self, config: Method, dense: Scores) -> Iterator[dict[str, Any]]:
        """Yield a method at every sparsity, from one profile."""
        profile = self.calibrated(config)
        for sparsity in SPARSITIES:
            setting = profile.with_settings(sparsity=sparsity)
            sparsify_(self.model, setting)
            found = compared(dense, self.scored("all"))
            sites = status(self.model)
            restore_(self.model)
            realised, read = overall(sites)
            measured = {"tokens": sites[0].tokens, "realised_sparsity": realised, "weights_read": read}
            for score in found:
                yield {"run": "sparse", **setting.recipe.record(), "apply_to": "all", **asdict(score), **measured}

    def calibrated(self, config: Method, tokens: int = TOKENS) -> Any:
        """Return a profile of `config`, calibrated on the validation split."""
        text = load_text("wikitext2", "calibration", text_dir=os.environ["TEXT_DIR"])
        return calibrate(self.model, self.tokenizer, text, config, tokens=tokens, progress=False)


def _configs() -> list[Method]:
    """Return every method for FFNs, weighted where `rms` costs nothing at run time; then those without it."""
    tokenwise = [name for name in method_names() if not method(name).selector.from_prompt]
    names = [name for name in tokenwise if method_class(name).kind == "ffn"]
    weighted = [name for name in names if "rms" in method_class(name).weightings]
    usual = [method(name, weighting="rms" if name in weighted else "none", decision="threshold") for name in names]
    return [*usual, *(method(name, weighting="none", decision="threshold") for name in weighted)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--limit", type=int, required=True, help="documents, the first of the task")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", help="where the checkout has no git history")
    return parser.parse_args()


if __name__ == "__main__":
    main()
