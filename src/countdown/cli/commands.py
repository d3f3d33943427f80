"""The commands. Each loads what it needs when it runs, so that --help loads no torch."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from countdown.cli import benchmark, inputs, printing
from countdown.cli import options as o
from countdown.cli.calibrate import calibrate
from countdown.cli.chat import chat
from countdown.cli.compare import compare
from countdown.cli.serve import serve
from countdown.config import CALIBRATION_TOKENS
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.methods import METHODS, method, method_class, method_names, named

if TYPE_CHECKING:
    from torch import nn

    from countdown.cost import Ceiling
    from countdown.evaluation.generation import Generation
    from countdown.sites import Site

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Faster LLM decoding by skipping the FFN neurons a token does not need.",
)

app.add_typer(benchmark.app, name="benchmark")
app.command()(calibrate)
app.command()(compare)
app.command()(chat)
app.command()(serve)


@app.callback()
def _root(version: o.Version = False) -> None:
    pass


@app.command()
def inspect(
    model: o.Model,
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    json: o.Json = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Show a model's gated FFNs, and what each method could gain on it. Reads no weights."""
    from countdown.compensation.affine import Affine
    from countdown.cost import beside_bytes, token_bytes
    from countdown.loading import Source, load_skeleton
    from countdown.sites.ffn import find_ffns

    skeleton = load_skeleton(Source.parse(model, revision=revision, trust_remote_code=trust_remote_code))
    ffns = find_ffns(skeleton)
    bytes_ = token_bytes(skeleton, ffns)
    ceilings = _ceilings(skeleton)
    beside = {name: extra for name in method_names() if (extra := beside_bytes(ffns, method(name)))}
    facts = {
        "model_class": type(skeleton).__name__,
        "ffns": [
            {"name": f.name, "class": type(f.module).__name__, "d": f.d, "h": f.h, "activation": f.activation}
            for f in ffns
        ],
        "ffn_share_of_token_bytes": bytes_.own / bytes_.total,
        "ceilings": [asdict(row) for row in ceilings],
        "beside_bytes": beside,
    }
    printing.emit(json, facts)
    out = printing.table_console(json)
    first = ffns[0]
    out.print(
        f"{facts['model_class']}: {len(ffns)} gated FFNs ({type(first.module).__name__}), d {first.d}, h {first.h}, "
        f"{first.activation}\n{first.name} … {ffns[-1].name}\n"
        f"The FFNs are {bytes_.own / bytes_.total:.0%} of the weight bytes that a decoded token reads."
    )
    rows = [
        (
            c.method,
            f"{c.sparsity:.0%}",
            f"{c.weights_read:.0%}",
            f"{c.own_speedup:.2f}×",
            f"{c.token_speedup:.2f}×",
        )
        for c in ceilings
    ]
    printing.print_table(out, ["method", "sparsity", "weights read", "ceiling of its modules", "of the token"], rows)
    out.print("Ceilings count bytes: what decoding bound by memory bandwidth could gain at most.")
    for name, extra in beside.items():
        out.print(f"{name} keeps {extra / 1e6:.1f} MB beside the weights.")
    predicted = sum(Affine.bytes_of(ffn.sum.outputs, ffn.d) for ffn in ffns)
    more = f"With --compensate affine {predicted / 1e6:.1f} MB more"
    out.print(f"{more}; a profile has as much for each sparsity that is fitted, four at most.")


def _ceilings(model: nn.Module) -> list[Ceiling]:
    """Return what each method and named recipe that has modules in a model could gain, at several sparsities."""
    from countdown.cost import ceiling, token_bytes
    from countdown.profiles.recipe import Recipe, match
    from countdown.sites import SITES

    sites: dict[str, Site] = {}
    for kind in dict.fromkeys(method_class(name).kind for name in method_names()):
        with suppress(UnsupportedModelError):  # the model has none of these
            sites |= {site.name: site for site in SITES.get(kind).find(model)}
    found = []
    for name in [*method_names(), *(name for name in METHODS.names() if named(name))]:
        entries = Recipe.named(name).entries
        wanted = [(entry.pattern, entry.method.kind) for entry in entries]
        try:
            owners = match(wanted, [(site.name, site.kind) for site in sites.values()])
        except ConfigError:  # it takes modules that the model does not have
            continue
        taken = [[sites[n] for n, owner in owners.items() if owner == place] for place in range(len(entries))]
        own = token_bytes(model, [sites[n] for n in owners])
        for sparsity in (0.5, 0.7, 0.8, 0.9):
            methods = [entry.method for entry in Recipe.named(name, sparsity=sparsity).entries]
            found.append(ceiling(own, list(zip(taken, methods, strict=True)), name))
    return found


@app.command()
def evaluate(
    model: o.Model,
    profile: o.ProfileDir = None,
    method_name: o.MethodName = None,
    sparsity: o.Sparsity = None,
    decision: o.Decision = None,
    weighting: o.Weighting = None,
    allocation: o.Allocation = None,
    bits: o.Bits = None,
    alpha: o.Alpha = None,
    compensate: o.Compensate = None,
    second_look: o.SecondLook = None,
    text: Annotated[str | None, typer.Option("--text", help=f"{o.TEXT_HELP} [python-docs]")] = None,
    text_dir: o.TextDir = None,
    windows: Annotated[int | None, typer.Option(min=1, help="How many windows of text to score. [16]")] = None,
    window: o.Window = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="So many tokens of each window are a dense prompt. [none]")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Instead of text: tasks of lm-eval, such as piqa,arc_easy.")] = None,
    tasks_dir: o.TasksDir = None,
    limit: o.Limit = None,
    batch_size: o.BatchSize = None,
    prompts: Annotated[Path | None, o.path(help="Instead of text: a file of prompts to continue.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of a continuation. [64]")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="all: every token sparse. decode: dense prompt. [all; decode for --prompts]")
    ] = None,
    tokens: o.Tokens = CALIBRATION_TOKENS,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    json: o.Json = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure what sparsity costs against the same model run dense: on a text, on tasks, or on its own answers."""
    from countdown.cli.evaluation import subject
    from countdown.loading import Source, load_context, load_tokenizer
    from countdown.results import meta
    from countdown.sparsify import sparsify_

    what = subject(
        text=text, text_dir=text_dir, windows=windows, window=window, prompt_tokens=prompt_tokens,
        tasks=tasks, tasks_dir=tasks_dir, limit=limit, batch_size=batch_size,
        prompts=prompts, max_new_tokens=max_new_tokens,
        protocol=protocol, details=json is not None,
    )  # fmt: skip
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    chosen = inputs.chosen(
        profile,
        method_name,
        inputs.given_settings(sparsity, decision, weighting, allocation, bits, alpha, compensate, second_look),
        source,
    )
    if chosen is None:
        raise ConfigError("give --profile DIR (made by countdown calibrate) or --method NAME to calibrate now.")
    calibration_text = inputs.calibration_text(chosen, text or "python-docs", text_dir)
    tokenizer = load_tokenizer(source)
    # What is wrong with it shows before the model loads.
    what.prepare(tokenizer, chosen, load_context(source))
    loaded = inputs.load(source, dtype, device, seed)
    what.check(loaded, tokenizer)
    made = inputs.as_profile(chosen, loaded, tokenizer, calibration_text, tokens, window, source)
    sparsify_(loaded, made)
    records = what.run(loaded, tokenizer, made.recipe, printing.table_console(json))
    about = {"model": source.label, **made.recipe.record()}
    printing.emit(
        json,
        {
            "meta": meta(**what.meta(), calibration=made.calibration),
            "records": [about | record for record in records],
        },
    )


@app.command()
def generate(
    model: o.Model,
    prompt: Annotated[str, typer.Argument(help="What to ask, or - to read it from stdin.", show_default=False)],
    profile: o.ProfileDir = None,
    method_name: o.MethodName = None,
    sparsity: o.Sparsity = None,
    decision: o.Decision = None,
    weighting: o.Weighting = None,
    allocation: o.Allocation = None,
    bits: o.Bits = None,
    alpha: o.Alpha = None,
    compensate: o.Compensate = None,
    second_look: o.SecondLook = None,
    compare: Annotated[bool, typer.Option("--compare", help="Dense first, then sparse, and where they part.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens: divide logits by this. [greedy]")] = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    apply_to: Annotated[str, typer.Option(help="decode: the prompt is dense. all: every token sparse.")] = "decode",
    tokens: o.Tokens = CALIBRATION_TOKENS,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    json: o.Json = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Generate, streaming, greedily unless told otherwise; without a profile or method the model stays dense."""
    from countdown.config import check_choice
    from countdown.engine.engine import check_fits
    from countdown.evaluation.generation import encode_prompt
    from countdown.evaluation.generation import generate as run
    from countdown.loading import Source, load_tokenizer
    from countdown.modules import APPLY_TO
    from countdown.results import meta
    from countdown.sparsify import sparsify_

    check_choice("--apply-to", apply_to, APPLY_TO)
    sampling = inputs.sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    chosen = inputs.chosen(
        profile,
        method_name,
        inputs.given_settings(sparsity, decision, weighting, allocation, bits, alpha, compensate, second_look),
        source,
    )
    if compare and chosen is None:
        raise ConfigError("--compare needs something to compare dense with: give --profile or --method.")
    calibration_text = inputs.calibration_text(chosen, "python-docs", None) if chosen else None
    tokenizer = load_tokenizer(source)
    ids = encode_prompt(tokenizer, inputs.read_stdin() if prompt == "-" else prompt, raw=raw)
    loaded = inputs.load(source, dtype, device, seed)
    check_fits(loaded, ids[0].tolist(), max_new_tokens)  # before anything is calibrated
    made = inputs.as_profile(chosen, loaded, tokenizer, calibration_text, tokens, None, source) if chosen else None
    runs: dict[str, Generation] = {}
    for name in (["dense"] if compare or made is None else []) + (["sparse"] if made else []):
        if name == "sparse" and made is not None:
            sparsify_(loaded, made, apply_to=apply_to)
        if compare:
            typer.secho(name, bold=True, err=json == "-")
        runs[name] = run(
            loaded,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            write=lambda piece: typer.echo(piece, nl=False, err=json == "-"),
            sampling=sampling,
        )
        typer.echo(err=json == "-")
    printing.print_speeds(runs, loaded)
    settings = {"dense": {}, "sparse": made.recipe.record() | {"apply_to": apply_to} if made else {}}
    records = [{"model": source.label, "run": n, **settings[n], **asdict(found)} for n, found in runs.items()]
    printing.emit(json, {"meta": meta(), "records": records})


@app.command()
def export(
    model: o.Model,
    profile: Annotated[Path, o.path("--profile", help="A profile made by calibrate.", show_default=False)],
    output: Annotated[Path, o.path("-o", "--output", help="Folder to make.", show_default=False)],
    include_derived: o.IncludeDerived = False,
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Write a folder with the dense model, its tokenizer and a profile: one name to load, sparse or dense."""
    from countdown.sparsify import export as write

    path = write(
        model, profile, output,
        dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, include_derived=include_derived,
    )  # fmt: skip
    printing.say(f"written; run: {shlex.join(['countdown', 'generate', str(path), 'Hello'])}")
    typer.echo(str(path))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(callback=o.home, help="Folder that compare wrote.", show_default=False)],
    output: Annotated[Path | None, o.path("-o", "--output", help="File to make. [FOLDER/report.html]")] = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Write what a comparison found as one HTML file that needs no network."""
    from countdown.comparison.comparison import Comparison
    from countdown.report.html import check_installed, write_report

    check_installed()
    path = output or (folder.parent if folder.is_file() else folder) / "report.html"
    inputs.check_file_free(path, overwrite=overwrite)
    write_report(Comparison.load(folder), path)
    typer.echo(str(path))


@app.command()
def demo(
    output: Annotated[Path, o.path("-o", "--output", help="Folder for the comparison and its report.")] = Path(
        "countdown-demo"
    ),
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Compare SmolLM2-135M dense, sparse and quantised on this CPU, offline; print the numbers and write a report."""
    from countdown.demo import find_model, run_demo
    from countdown.report.html import check_installed, write_report

    check_installed()
    report = output / "report.html"
    inputs.check_file_free(report, overwrite=overwrite)
    shown = o.show_progress()
    found = run_demo(
        output,
        overwrite=overwrite,
        progress=shown,
        say=printing.say if shown else lambda _: None,
        on_cell=printing.say_cell if shown else lambda _: None,
    )
    write_report(found, report)
    printing.print_comparison(printing.table_console(None), found)
    typer.echo(f"report: {report}")
    typer.echo(f"next: countdown inspect {shlex.quote(str(find_model()))}")
