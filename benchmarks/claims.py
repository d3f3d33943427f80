"""Published claims, measured on a model: quality by text and tasks, beside what the papers say.

    python benchmarks/claims.py MODEL --output benchmarks/results/claims-NAME.json

MODEL is a hub id, folder or GGUF file. On WikiText-2 where --text-dir (or TEXT_DIR) names a folder with its valid.txt
and test.txt, or --text wikitext2 fetches it; else on python-docs. Windows of 512, every token sparse; behind a prompt
of half a window where a method chooses from the prompt. --tasks NAME,... scores tasks of lm-eval, too, where a claim
is of accuracy; --only ID measures some claims. At the end stands the table, speeds in it from results files of
`countdown benchmark` and benchmarks/linears.py, by default those of this repository (--speed FILE for others).

To add a claim, add a record to CLAIMS: its table, what is measured for it and its verdict follow.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claim_rules import Arm, Better, Evidence, Faster, Loss, Rule, Speed, Untestable, Verdict
from documents import load, said, table

# Papers say "negligible", "minimal" or "little" where they give no number: read as this share.
NEGLIGIBLE = 0.01
SPEEDS = ("gpu-decode-h200", "gpu-decode-linears-h200", "gpu-ffn-h200", "linears-h200")
WINDOWS, TOKENS = 16, 32768


@dataclass(frozen=True)
class Claim:
    """A published claim and how it is judged here.

    Args:
        id: What --only takes.
        paper: Name and arXiv id.
        where: Where in the paper the number stands.
        says: The claim, with its number.
        protocol: How the paper measured it.
        here: What we measure for it.
        rule: What makes a verdict of that.
        command: What measures it, `MODEL` standing for the model; a claim of speed has a command of its own.
    """

    id: str
    paper: str
    where: str
    says: str
    protocol: str
    here: str
    rule: Rule
    command: str = ""

    def __post_init__(self) -> None:
        """Fill in the command of all that this script measures."""
        if not self.command:
            object.__setattr__(self, "command", f"python benchmarks/claims.py MODEL --only {self.id}")


COUNTDOWN = "COUNTDOWN, arXiv 2505.17701"
R_SPARSE = "R-Sparse, arXiv 2504.19449"
TEAL = "TEAL, arXiv 2408.14690"
WINA = "WINA, arXiv 2505.19427"
CATS = "CATS, arXiv 2404.08763"
CHESS = "CHESS, arXiv 2409.01366"
RELU2 = "ReLU² Wins, arXiv 2402.03804"
OPPORTUNITIES = "Activation Sparsity Opportunities, arXiv 2412.12178"
GRIFFIN = "GRIFFIN, arXiv 2404.01365"

CATS_HALF = Arm("cats", 0.5)
ALL_LINEARS = "every linear of every block"
BLOCK = ("linears", "all seven")
LLAMA_FFN = (("d", 4096), ("h", 14336), ("tokens", 1))


def _decode(method: str, sparsity: float, **more: Any) -> Speed:
    fields = {"run": "sparse", "method": method, "sparsity": sparsity, **more}
    return Speed("speedup", tuple(fields.items()))


def _ffn(method: str, sparsity: float) -> Speed:
    return Speed("speedup_to_fused_cublas", (("method", method), ("sparsity", sparsity), *LLAMA_FFN))


def _linears(sparsity: float, alpha: float) -> Speed:
    return Speed("speedup_over_fused", (BLOCK, ("sparsity", sparsity), ("alpha", alpha)))


def _timed(method: str, sparsity: float, shape: str = "llama-3.1-8b", more: str = "") -> str:
    return f"countdown benchmark decode --shape {shape} --method {method} --sparsity {sparsity}{more} --json FILE"


CLAIMS = (
    Claim(
        id="countdown-d",
        paper=COUNTDOWN,
        where="abstract",
        says="D-COUNTDOWN, ideal, skips 90% and loses as little as 5.5%",
        protocol="ideal top-k by the coefficient; tasks of lm-eval; instruction-tuned models, 8 to 15 billion weights",
        here="`d-countdown` at 90%, topk",
        rule=Loss((Arm("d-countdown", 0.9, decision="topk"),), 0.055),
    ),
    Claim(
        id="countdown-m",
        paper=COUNTDOWN,
        where="abstract",
        says="M-COUNTDOWN keeps up to 29.4% more than earlier methods, without a predictor",
        protocol="tasks of lm-eval at 70, 80 and 90%, same models; against CATS",
        here="`m-countdown` against `cats`, thresholds, unweighted",
        rule=Better(tuple((Arm("m-countdown", s), Arm("cats", s)) for s in (0.7, 0.8, 0.9)), by=0.294),
    ),
    Claim(
        id="countdown-kernels",
        paper=COUNTDOWN,
        where="abstract, without a number",
        says="Kernels make skipped computation real acceleration",
        protocol="their Triton kernels, one token",
        here="`m-countdown` at 80% in our kernels",
        rule=Faster(1.0, _decode("m-countdown", 0.8), _ffn("m-countdown", 0.8)),
        command=_timed("m-countdown", 0.8),
    ),
    Claim(
        id="r-sparse-quality",
        paper=R_SPARSE,
        where="abstract; its loss on eight tasks: 2.7% on Llama-2-7B, 4.6% on Llama-3-8B, 2.1% on Mistral-7B",
        says="Comparable at 50% of the model's weights; we read: at most the largest loss of its own, 4.6%",
        protocol=f"{ALL_LINEARS}; eight tasks of lm-eval; α of each linear by search",
        here="`r-sparse` at 50%, one α for all linears: 0.95, and 1, which has no low rank",
        rule=Loss(tuple(Arm("r-sparse", 0.5, alpha=a) for a in (0.95, 1.0)), 0.046, each=False),
    ),
    Claim(
        id="r-sparse-low-rank",
        paper=R_SPARSE,
        where="abstract",
        says="Input channels and singular values together approximate a linear better than channels alone",
        protocol="equal budget; α of each linear by search, or one α of 0.95",
        here="`r-sparse` at 50%, α 0.95 against 1, equal bytes",
        rule=Better(((Arm("r-sparse", 0.5, alpha=0.95), Arm("r-sparse", 0.5, alpha=1.0)),)),
    ),
    Claim(
        id="r-sparse-speed",
        paper=R_SPARSE,
        where="abstract",
        says="43% faster end to end at 50%",
        protocol="generation in float32, one A6000",
        here="`r-sparse` at 50%, low rank included (α 0.98): the linears of a block against cuBLAS",
        rule=Faster(1.43, _decode("r-sparse", 0.5, alpha=0.98), _linears(0.5, 0.98)),
        command=_timed("r-sparse:alpha=0.98", 0.5),
    ),
    Claim(
        id="teal-quality",
        paper=TEAL,
        where="abstract, without a number",
        says="40 to 50% of the whole model at minimal loss",
        protocol=f"{ALL_LINEARS}, greedy allocation; perplexity and tasks; Llama-2, Llama-3, Mistral, 7 to 70 billion",
        here="`teal`, greedy allocation, 40 and 50%",
        rule=Loss(tuple(Arm("teal", s, allocation="greedy") for s in (0.4, 0.5)), NEGLIGIBLE),
    ),
    *(
        Claim(
            id=f"teal-speed-{sparsity:.0%}".removesuffix("%"),
            paper=TEAL,
            where="abstract",
            says=f"Up to {ratio} times as fast at {sparsity:.0%}",
            protocol="decoding one sequence in float16, compiled, on A6000 and A100",
            here=f"`teal` at {sparsity:.0%}: the linears of a block against cuBLAS",
            rule=Faster(ratio, _decode("teal", sparsity), _linears(sparsity, 1.0)),
            command=_timed("teal", sparsity),
        )
        for sparsity, ratio in ((0.4, 1.53), (0.5, 1.8))
    ),
    Claim(
        id="wina",
        paper=WINA,
        where="abstract",
        says="Up to 2.94% above TEAL at the same sparsity",
        protocol="mean over tasks, up to 65%, greedy allocation; weights first made column-orthogonal",
        here="`wina` against `teal`, greedy allocation, 50 and 65%, weights as they are",
        rule=Better(
            tuple(
                (Arm("teal", s, "shared-norm", allocation="greedy"), Arm("teal", s, allocation="greedy"))
                for s in (0.5, 0.65)
            ),
            by=0.0294,
        ),
    ),
    Claim(
        id="cats-quality",
        paper=CATS,
        where="abstract",
        says="Within 1 to 2% of the base model at 50%, not fine-tuned",
        protocol="tasks; Llama-2-7B, Mistral-7B",
        here="`cats` at 50%",
        rule=Loss((CATS_HALF,), 0.02),
    ),
    Claim(
        id="cats-speed",
        paper=CATS,
        where="abstract",
        says="About 15% faster token generation at 50%",
        protocol="Llama-2-7B, Mistral-7B, their kernel",
        here="`cats` at 50%: an FFN",
        rule=Faster(1.15, _decode("cats", 0.5), _ffn("cats", 0.5)),
        command=_timed("cats", 0.5),
    ),
    Claim(
        id="chess-quality",
        paper=CHESS,
        where="abstract",
        says="Loses less than earlier methods with fewer active weights",
        protocol="eight tasks; against CATS",
        here="`chess` (FFNs and the inputs of q and o) against `cats` (FFNs alone), both at 50%",
        rule=Better(((Arm("chess", 0.5), CATS_HALF),)),
    ),
    Claim(
        id="chess-speed",
        paper=CHESS,
        where="abstract",
        says="Up to 1.27 times as fast",
        protocol="end to end on a CPU",
        here="`chess` at 50% on a CPU",
        rule=Faster(
            1.27, Speed("speedup", (("run", "sparse"), ("recipe", (("cats", 0.5), ("teal", 0.5), ("teal", 0.5)))))
        ),
        command=_timed("chess", 0.5, "qwen2.5-1.5b", " --device cpu"),
    ),
    Claim(
        id="relu2-without-relu",
        paper=RELU2,
        where="abstract, without a number",
        says="Models without ReLU are sparse, too, where a neuron counts by the size of its output",
        protocol="threshold on the size of a neuron's output, in each layer; tasks and perplexity",
        here="`d-countdown` × column-norm (the size of s_i·w_i) at 50%; sparse means: half, losing at most 1%",
        rule=Loss((Arm("d-countdown", 0.5, weighting="column-norm"),), NEGLIGIBLE),
    ),
    Claim(
        id="relu2-wins",
        paper=RELU2,
        where="from a summary of it",
        says="With ReLU² less than 0.1% is lost at close to 90%",
        protocol="models trained from the start with each activation",
        here="nothing",
        rule=Untestable("needs models trained with ReLU², of the same data as others"),
        command="none",
    ),
    Claim(
        id="opportunities",
        paper=OPPORTUNITIES,
        where="abstract",
        says="About half of the FFNs' memory and computation at negligible loss",
        protocol="percentile thresholds on activations, a predictor assumed; perplexity",
        here="half of the neurons: `cats` by threshold, and `d-countdown`, topk, as a perfect predictor would",
        rule=Loss((CATS_HALF, Arm("d-countdown", 0.5, decision="topk")), NEGLIGIBLE, of="perplexity", each=False),
    ),
    Claim(
        id="griffin-quality",
        paper=GRIFFIN,
        where="abstract",
        says="Half of the FFNs' weights, little or nothing lost",
        protocol="classification and generation; set chosen from the prompt; Llama-2, Gemma, Mistral, OPT",
        here="`griffin` at 50%, behind a dense prompt of half a window",
        rule=Loss((Arm("griffin", 0.5, decision="topk"),), NEGLIGIBLE),
    ),
    Claim(
        id="griffin-speed",
        paper=GRIFFIN,
        where="abstract",
        says="1.29 times as fast (Gemma 7B), 1.25 (Llama 2 13B)",
        protocol="generation on one L40, half of the FFNs' weights",
        here="half of the neurons given: an FFN",
        rule=Faster(1.25, _decode("griffin", 0.5), _ffn("given", 0.5)),
        command=_timed("griffin", 0.5),
    ),
)


def main() -> None:
    """Measure and write, then print the table."""
    arguments = _arguments()
    # Here, not above: tables.py reads the claims, and need not load torch.
    from claim_figures import Bench
    from countdown.results import meta, write
    from documents import commit

    bench = Bench.of(arguments)
    command = ["python", "benchmarks/claims.py", bench.label, *_said(arguments)]
    about = {"tokens": arguments.tokens, "windows": arguments.windows}
    header = meta(shlex.join(command), commit=arguments.commit or commit(), **about)
    records = []
    for record in bench.records(arms(arguments.only)):
        records.append(record)
        print(*(record.get(key, "") for key in ("arm", "task", "metric", "sparse", "perplexity", "error")), flush=True)
        # Each time: a run that is cut short has what it measured.
        write(arguments.output, {"meta": header, "records": records})
    document = {"meta": header, "records": records}
    evidence = [*_evidence(arguments.output.stem, document), *gathered(arguments.speed)]
    chosen = [claim for claim in CLAIMS if not arguments.only or claim.id in arguments.only]
    print(rows(chosen, {bench.label: evidence}))


def arms(only: Sequence[str] | None = None) -> list[Arm]:
    """Return what the claims, or those of these ids, need of a model, each once."""
    chosen = [claim for claim in CLAIMS if not only or claim.id in only]
    return list(dict.fromkeys(arm for claim in chosen for arm in claim.rule.arms))


def is_speed(claim: Claim) -> bool:
    """Return whether a claim is of speed, which does not depend on what a model has learnt."""
    return isinstance(claim.rule, Faster)


def gathered(names: Sequence[str | Path]) -> list[Evidence]:
    """Return the records of results files: names of this repository's, or paths."""
    found = []
    for name in names:
        document = json.loads(name.read_text(encoding="utf-8")) if isinstance(name, Path) else load(name)
        found += _evidence(Path(name).stem, document)
    return found


def _evidence(source: str, document: dict[str, Any]) -> list[Evidence]:
    hardware = document["meta"]["hardware"]
    return [Evidence(source, hardware.get("gpu") or hardware["cpu"], record) for record in document["records"]]


def rows(claims: Sequence[Claim], models: dict[str, list[Evidence]]) -> str:
    """Return a Markdown table of claims: what is published, and for each model what was measured and the verdict."""
    head = ["claim", "published", "how", "here", *models, "command"]
    lines = []
    for claim in claims:
        verdicts = [_cell(claim.rule.verdict(evidence)) for evidence in models.values()]
        published = f"{claim.says} ({claim.paper}; {claim.where})"
        lines.append([f"`{claim.id}`", published, claim.protocol, claim.here, *verdicts, f"`{claim.command}`"])
    return table(head, lines, left=len(head))


def _cell(verdict: Verdict) -> str:
    return "<br>".join([f"**{verdict}**", *verdict.figures]).replace("|", "\\|")


def quality(models: dict[str, Sequence[str]]) -> str:
    """Return the table of claims of quality for the docs, a column for each model and the files of its figures."""
    shown = [claim for claim in CLAIMS if not is_speed(claim)]
    sources = "\n".join(_source(name) for names in models.values() for name in names)
    return rows(shown, {model: gathered(names) for model, names in models.items()}) + f"\n{sources}\n"


def speed(names: Sequence[str] = SPEEDS) -> str:
    """Return the table of claims of speed for the docs."""
    shown = [claim for claim in CLAIMS if is_speed(claim)]
    sources = "\n".join(_source(name) for name in names)
    return rows(shown, {"measured": gathered(names)}) + f"\n{sources}\n"


def _source(name: str) -> str:
    """Return where a file's figures come from."""
    document = load(name)
    meta, first = document["meta"], document["records"][0]
    hardware = meta["hardware"].get("gpu") or meta["hardware"]["cpu"]
    return (
        f"- `benchmarks/results/{name}.json`: {hardware}, {first.get('dtype')}, torch {meta['versions']['torch']}, "
        f"commit {meta['commit'][:8]}, {meta['date'][:10]}; `{meta['command']}`"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--only", nargs="+", metavar="ID", choices=[claim.id for claim in CLAIMS])
    parser.add_argument("--text", choices=["wikitext2", "python-docs"], help="[wikitext2 with --text-dir]")
    parser.add_argument("--text-dir", default=os.environ.get("TEXT_DIR"))
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="that are calibrated on")
    parser.add_argument("--tasks", type=lambda given: given.split(","), default=[], help="of lm-eval: piqa,arc_easy")
    parser.add_argument("--tasks-dir", help="a folder with task files of your own")
    parser.add_argument("--limit", type=int, help="documents of a task, its first")
    parser.add_argument("--batch-size", type=int, default=8, help="of tasks")
    parser.add_argument("--no-text", action="store_true", help="tasks alone")
    parser.add_argument("--speed", nargs="*", type=Path, default=list(SPEEDS), metavar="FILE", help="in place of ours")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", help="where the checkout has no git history")
    arguments = parser.parse_args()
    arguments.text = arguments.text or ("wikitext2" if arguments.text_dir else "python-docs")
    if arguments.no_text and not arguments.tasks:
        parser.error("--no-text needs --tasks")
    return arguments


def _said(arguments: argparse.Namespace) -> list[str]:
    """Return the arguments as a results file has them: the text by name, and no folders of this machine."""
    rest = iter(said(sys.argv[1:], arguments.model))
    kept = []
    for one in rest:
        if one in ("--text-dir", "--tasks-dir", "--text"):
            next(rest, None)
        else:
            kept.append(one)
    return [*kept, "--text", arguments.text]


if __name__ == "__main__":
    main()
