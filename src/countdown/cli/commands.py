"""The commands. Each loads what it needs when it runs, so that --help loads no torch."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countdown.cli import benchmark, printing
from countdown.cli import options as o
from countdown.cli.compare import compare
from countdown.cli.options import AUTO
from countdown.config import CALIBRATION_TOKENS
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.files import streams, unwritable_file
from countdown.methods import METHODS, method, method_class, method_names, named

if TYPE_CHECKING:
    from torch import nn

    from countdown.cost import Ceiling
    from countdown.evaluation.generation import Generation
    from countdown.loading import Source
    from countdown.profiles.profile import Profile
    from countdown.profiles.recipe import Recipe
    from countdown.sites import Site
    from countdown.text import Text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Faster LLM decoding by skipping the FFN neurons a token does not need.",
)

app.add_typer(benchmark.app, name="benchmark")
app.command()(compare)


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
def calibrate(
    model: o.Model,
    output: Annotated[Path | None, o.path("-o", "--output", help="Profile to make. [NAME-METHOD]")] = None,
    method_name: Annotated[
        str, typer.Option("--method", callback=o.known_methods, help=f"{o.METHOD_HELP} auto: try them and pick.")
    ] = AUTO,
    sparsity: o.Sparsity = None,
    max_loss: Annotated[float | None, typer.Option(help="Instead of --sparsity: let perplexity rise so far.")] = None,
    decision: o.Decision = None,
    weighting: o.Weighting = None,
    allocation: o.Allocation = None,
    bits: o.Bits = None,
    text: Annotated[list[str] | None, typer.Option("--text", help=o.TEXTS_HELP)] = None,
    text_dir: o.TextDir = None,
    tokens: o.Tokens = CALIBRATION_TOKENS,
    window: o.Window = None,
    include_derived: o.IncludeDerived = False,
    overwrite: o.Overwrite = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Estimate what a method needs from a text and write it as a profile."""
    from countdown.calibration.calibrate import calibration_sequences
    from countdown.cost import beside_bytes
    from countdown.evaluation.choice import trial_sequences
    from countdown.loading import Source, load_context, load_tokenizer, window_length
    from countdown.profiles.profile import check_free
    from countdown.sites import find_sites

    settings = _given(sparsity, decision, weighting, allocation, bits)
    config = None if method_name == AUTO else _recipe(method_name, settings)
    _check_wishes(method_name, settings, max_loss)
    if include_derived and config and not config.derives:
        raise ConfigError(
            f"--include-derived stores proxies (d-proxy) and low ranks (r-sparse, α below 1); {config} has none."
        )
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    path = output or Path(f"{source.label.rpartition('/')[2]}-{Path(method_name).stem}")
    check_free(path, overwrite=overwrite)
    texts = _texts(text or ["python-docs"], text_dir)
    tokenizer = load_tokenizer(source)
    # What is wrong with it shows before the model loads.
    read = trial_sequences if config is None else calibration_sequences
    if config is None or config.reads_text:
        read(tokenizer, texts, tokens, window_length(load_context(source), window))
    loaded = _load(source, dtype, device, seed)
    if config is None:
        profile = _picked(loaded, tokenizer, texts, settings, max_loss, tokens, window, source)
    else:
        profile = _calibrate(loaded, tokenizer, texts, config, tokens, window, source)
    if include_derived and profile.derives:
        profile = profile.with_derived(loaded)
    elif include_derived:
        printing.say("no derived weights are stored: what was picked has none")
    profile.save(path, overwrite=overwrite)
    sites = {site.name: site for site in find_sites(loaded, profile.kinds)}
    if extra := sum(beside_bytes([sites[name] for name in e.sites], e.method) for e in profile.entries):
        printing.say(f"when it runs, derived weights take {extra / 1e6:.1f} MB beside the model's")
    again = shlex.join(["countdown", "generate", model, "--profile", str(path), "Hello"])
    printing.say(f"profile of {profile.recipe} written; run: {again}")
    typer.echo(str(path))


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
    text: Annotated[str | None, typer.Option("--text", help=f"{o.TEXT_HELP} [python-docs]")] = None,
    text_dir: o.TextDir = None,
    windows: Annotated[int | None, typer.Option(min=1, help="How many windows of text to score. [16]")] = None,
    window: o.Window = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="So many tokens of each window are a dense prompt. [none]")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Instead of text: tasks of lm-eval, such as piqa,arc_easy.")] = None,
    tasks_dir: Annotated[Path | None, o.path(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents of each task. [all]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences of a task in a call. [1]")] = None,
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
    chosen = _chosen(profile, method_name, _given(sparsity, decision, weighting, allocation, bits), source)
    if chosen is None:
        raise ConfigError("give --profile DIR (made by countdown calibrate) or --method NAME to calibrate now.")
    calibration_text = _calibration_text(chosen, text or "python-docs", text_dir)
    tokenizer = load_tokenizer(source)
    # What is wrong with it shows before the model loads.
    what.prepare(tokenizer, chosen, load_context(source))
    loaded = _load(source, dtype, device, seed)
    what.check(loaded, tokenizer)
    made = _as_profile(chosen, loaded, tokenizer, calibration_text, tokens, window, source)
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
    compare: Annotated[bool, typer.Option("--compare", help="Dense first, then sparse, and where they part.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 128,
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
    """Generate greedily, streaming; without a profile or method the model stays dense."""
    from countdown.config import check_choice
    from countdown.evaluation.generation import check_fits, encode_prompt
    from countdown.evaluation.generation import generate as run
    from countdown.loading import Source, load_tokenizer
    from countdown.modules import APPLY_TO
    from countdown.results import meta
    from countdown.sparsify import sparsify_

    check_choice("--apply-to", apply_to, APPLY_TO)
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    chosen = _chosen(profile, method_name, _given(sparsity, decision, weighting, allocation, bits), source)
    if compare and chosen is None:
        raise ConfigError("--compare needs something to compare dense with: give --profile or --method.")
    calibration_text = _calibration_text(chosen, "python-docs", None) if chosen else None
    tokenizer = load_tokenizer(source)
    ids = encode_prompt(tokenizer, _read_stdin() if prompt == "-" else prompt, raw=raw)
    loaded = _load(source, dtype, device, seed)
    check_fits(loaded, ids, max_new_tokens)  # before anything is calibrated
    made = _as_profile(chosen, loaded, tokenizer, calibration_text, tokens, None, source) if chosen else None
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
    _check_file_free(path, overwrite=overwrite)
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
    _check_file_free(report, overwrite=overwrite)
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


def _check_file_free(path: Path, *, overwrite: bool) -> None:
    """Refuse to write over a file, or where none can be written."""
    if problem := unwritable_file(path):
        raise ConfigError(problem)
    if path.exists() and not streams(path) and not overwrite:
        raise ConfigError(f"{path} exists already; give another --output or --overwrite.")


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ConfigError("the prompt is - but stdin is closed; give a prompt, or pipe one in.")
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt from stdin is not text in {sys.stdin.encoding}.") from error


def _given(
    sparsity: float | None, decision: str | None, weighting: str | None, allocation: str | None, bits: int | None
) -> dict[str, Any]:
    """Return the settings that were given."""
    settings = {"sparsity": sparsity, "decision": decision, "weighting": weighting, "allocation": allocation}
    settings["bits"] = bits
    return {name: value for name, value in settings.items() if value is not None}


def _recipe(name: str, settings: dict[str, Any]) -> Recipe:
    """Return the recipe in the file of this name, or of the method of this name."""
    from countdown.profiles.recipe import SUFFIXES, Recipe

    if name == AUTO:
        raise ConfigError("--method auto belongs to countdown calibrate; give its --profile here.")
    if Path(name).suffix in SUFFIXES:
        return Recipe.load(name).with_settings(**settings)
    return Recipe.named(name, **settings)


def _check_wishes(name: str, settings: dict[str, Any], max_loss: float | None) -> None:
    """Refuse settings that are picked, and wishes for what is not."""
    from countdown.evaluation.choice import check_wishes

    if name != AUTO:
        if max_loss is not None:
            raise ConfigError("--max-loss belongs to --method auto, which finds the sparsity for it.")
        return
    if picked := [f"--{setting}" for setting in settings if setting != "sparsity"]:
        raise ConfigError(f"{picked[0]} is picked by --method auto; give it with a --method of your own.")
    check_wishes(settings.get("sparsity"), max_loss)


def _picked(
    model: nn.Module,
    tokenizer: Any,
    texts: list[Text],
    settings: dict[str, Any],
    max_loss: float | None,
    tokens: int,
    window: int | None,
    source: Source,
) -> Profile:
    from countdown.evaluation.choice import choose

    reading: Any = {"tokens": tokens, "window": window, "progress": o.show_progress()}
    choice = choose(model, tokenizer, texts, **settings, max_loss=max_loss, **reading)
    printing.say(choice.reason)
    return choice.profile.with_name(source.label)


def _chosen(path: Path | None, name: str | None, settings: dict[str, Any], source: Source) -> Profile | Recipe | None:
    """Return the profile that the options name, with their settings, or what to calibrate, or the model's own."""
    from countdown.profiles.profile import Profile
    from countdown.profiles.saving import own_profile

    if path is not None and name is not None:
        raise ConfigError("give --profile or --method, not both: a profile has its method.")
    if name is not None:
        return _recipe(name, settings)
    profile = own_profile(source) if path is None else Profile.load(path, model=source.given)
    if profile is None and settings:
        raise ConfigError(f"--{next(iter(settings))} needs --profile or --method; without, the model is dense.")
    if profile is not None and path is None:
        printing.say(f"using the profile in {source.label}")
    return profile and profile.with_settings(**settings)


def _texts(names: list[str], text_dir: Path | None) -> list[Text]:
    """Return the texts to calibrate on; `text_dir` goes to wikitext2, or else to what refuses it."""
    from countdown.text import load_text

    elsewhere = "wikitext2" not in names
    return [
        load_text(name, "calibration", text_dir=text_dir if elsewhere or name == "wikitext2" else None)
        for name in names
    ]


def _calibration_text(chosen: Profile | Recipe, text: str, text_dir: Path | None) -> list[Text] | None:
    """Return what to calibrate a method on: another split of a built-in text, python-docs for a file."""
    from countdown.profiles.profile import Profile
    from countdown.text import BUILT_IN, load_text

    if isinstance(chosen, Profile) or not chosen.reads_text:
        return None
    if text in BUILT_IN:
        return [load_text(text, "calibration", text_dir=text_dir)]
    return [load_text("python-docs", "calibration")]


def _as_profile(
    chosen: Profile | Recipe,
    model: nn.Module,
    tokenizer: Any,
    texts: list[Text] | None,
    tokens: int,
    window: int | None,
    source: Source,
) -> Profile:
    from countdown.profiles.profile import Profile

    if isinstance(chosen, Profile):
        return chosen
    return _calibrate(model, tokenizer, texts or [], chosen, tokens, window, source)


def _calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: list[Text],
    config: Recipe,
    tokens: int,
    window: int | None,
    source: Source,
) -> Profile:
    from countdown.calibration.calibrate import calibrate

    made = calibrate(model, tokenizer, texts, config, tokens=tokens, window=window, progress=o.show_progress())
    return made.with_name(source.label)


def _load(source: Source, dtype: str, device: str, seed: int) -> nn.Module:
    import torch

    from countdown.loading import load_model
    from countdown.ops import backends  # noqa: F401  (their names become known)
    from countdown.ops.request import requested

    requested()  # a backend that does not exist is said before the model loads
    torch.manual_seed(seed)
    return load_model(source, dtype=dtype, device=device)
