"""`countdown benchmark`: bandwidth, ffn, decode."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countdown.cli import options as o
from countdown.cli import printing
from countdown.errors import ConfigError
from countdown.files import streams
from countdown.methods import DEFAULT_METHOD

if TYPE_CHECKING:
    from torch import Tensor

    from countdown.loading import Source
    from countdown.profiles.profile import Profile

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed on this machine.")

Shape = Annotated[list[str] | None, typer.Option("--shape", help="d x h of an FFN, e.g. 4096x14336; may be repeated.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", callback=o.known_methods, help="Method, or given; may be repeated."),
]
Sparsities = Annotated[list[float] | None, typer.Option("--sparsity", help="Share to skip; may be repeated.")]
Counts = Annotated[list[int] | None, typer.Option("--tokens", help="Tokens in a call, 1 to 8; may be repeated.")]
Union = Annotated[
    Path | None, o.path(help="Results file that says how active sets of several tokens overlap in a model.")
]
Compiled = Annotated[bool, typer.Option("--compiled", help="Measure torch.compile of the dense FFN, too.")]
Commit = Annotated[str | None, typer.Option(help="Commit of this checkout, for the results file.")]


@app.command()
def bandwidth(
    device: o.Device = "auto",
    json: o.Json = None,
    commit: Commit = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Memory bandwidth of the device: of a copy and of reading; which of them floors are computed with."""
    from countdown.benchmark.timing import bandwidth as measure
    from countdown.loading import resolve_device
    from countdown.results import meta

    found = measure(resolve_device(device))
    printing.emit(json, {"meta": meta(**_commit(commit)), "records": [asdict(found)]})
    printing.table_console(json).print(
        f"copy {found.copy / 1e12:.3f} TB/s, read {found.read / 1e12:.3f} TB/s, floors by {found.floor / 1e12:.3f} TB/s"
    )


@app.command()
def ffn(
    shape: Shape = None,
    methods: Methods = None,
    sparsity: Sparsities = None,
    tokens: Counts = None,
    union: Union = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: o.Device = "auto",
    compiled: Compiled = False,
    json: o.Json = None,
    commit: Commit = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """One FFN with random weights, sparse against dense: time, floor, share of the floor."""
    from countdown.benchmark.ffn import FFNBenchmark, run
    from countdown.loading import resolve_device
    from countdown.results import meta

    shapes, overlaps = [_sizes(text) for text in shape or ["4096x14336"]], _union(union)
    where = resolve_device(device)
    given = {"methods": methods, "sparsities": sparsity, "tokens": tokens}
    benchmark = FFNBenchmark(
        shapes=shapes,
        union=overlaps,
        dtype=dtype,
        device=where,
        compiled=compiled,
        **{name: value for name, value in given.items() if value},  # type: ignore[arg-type]
    )
    records = _written(json, meta(**_commit(commit)), run(benchmark, progress=o.show_progress()))
    printing.print_ffn_speeds(printing.table_console(json), records)


@app.command()
def decode(
    model: Annotated[str | None, typer.Argument(help="Folder, hub id, or GGUF file.", show_default=False)] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape: llama-3.1-8b, qwen2.5-1.5b.")] = None,
    profile: o.ProfileDir = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            callback=o.known_methods,
            help="With --shape: method, with settings as r-sparse:alpha=0.98, or a recipe file; may be repeated.",
        ),
    ] = None,
    sparsity: o.Sparsity = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are timed.")] = 128,
    generate: Annotated[bool, typer.Option("--generate", help="Measure Hugging Face's generate, too.")] = False,
    versus: Annotated[str | None, typer.Option(help="Measure another program, too: llama.cpp.")] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    json: o.Json = None,
    commit: Commit = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """A whole model, dense and sparse in the same loop: tokens/s, and where a token's time goes."""
    from countdown.benchmark import llama_cpp
    from countdown.benchmark.decode import DecodeBenchmark, random_model, run
    from countdown.config import check_choice
    from countdown.loading import Source, load_model, resolve_device
    from countdown.profiles.recipe import Recipe
    from countdown.results import meta

    if (model is None) == (shape is None):
        raise ConfigError("give a model, or --shape for random weights.")
    if versus is not None:
        check_choice("--versus", versus, [llama_cpp.NAME])
        llama_cpp.check()
    where = resolve_device(device)
    say = printing.say if o.show_progress() else lambda _: None
    loaded: Any
    arms: list[Any]
    if shape is not None:
        if profile is not None:
            raise ConfigError("--profile belongs to a model; with --shape give --method and --sparsity.")
        settings = {} if sparsity is None else {"sparsity": sparsity}
        arms = [Recipe.parse(name).with_settings(**settings) for name in methods or [DEFAULT_METHOD]]
        loaded, name, prompt = random_model(shape, where, dtype="bfloat16" if dtype == "auto" else dtype), shape, None
    else:
        if methods:
            raise ConfigError("--method goes with --shape; a model is measured with its --profile.")
        source = Source.parse(str(model), revision=revision, trust_remote_code=trust_remote_code)
        arms, name, prompt = [_profile(source, profile, sparsity)], source.label, _prompt(source, context)
        loaded = load_model(source, dtype=dtype, device=device)
    benchmark = DecodeBenchmark(context, new_tokens, generate=generate, llama_cpp=versus is not None, prompt=prompt)
    found = run(loaded, arms, benchmark, progress=o.show_progress(), say=say)
    records = _written(json, meta(**_commit(commit)), ({"model": name} | record for record in found))
    printing.print_decode_speeds(printing.table_console(json), records)


def _written(json: str | None, header: dict[str, Any], records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records; a file has, at any time, all that were measured. What is written through is written once."""
    kept = []
    once = json == "-" or (json is not None and streams(Path(json)))
    for record in records:
        kept.append(record)
        if not once:
            printing.emit(json, {"meta": header, "records": kept})
    if once:
        printing.emit(json, {"meta": header, "records": kept})
    return kept


def _prompt(source: Source, length: int) -> Tensor:
    """Return the beginning of a text that calibration does not read."""
    from countdown.loading import load_tokenizer
    from countdown.text import load_text, windows

    return windows(load_tokenizer(source), load_text("python-docs", "evaluation"), count=1, length=length)


def _profile(source: Source, path: Path | None, sparsity: float | None) -> Profile:
    from countdown.profiles.profile import Profile
    from countdown.profiles.saving import own_profile

    profile = own_profile(source) if path is None else Profile.load(path, model=source.given)
    if profile is None:
        raise ConfigError(
            f"{source.label} has no profile of its own: give --profile DIR (made by countdown calibrate)."
        )
    return profile if sparsity is None else profile.with_settings(sparsity=sparsity)


def _sizes(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)[x×,]([1-9]\d*)", text)
    if not found:
        raise ConfigError(f"--shape is '{text}', expected two sizes, d and h, such as 4096x14336.")
    return int(found[1]), int(found[2])


def _union(path: Path | None) -> dict[tuple[int, float], float] | None:
    import json

    if path is None:
        return None
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))["records"]
        return {(int(r["tokens"]), float(r["sparsity"])): float(r["union"]) for r in records}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--union {path} is not a results file of unions: {error}") from error


def _commit(commit: str | None) -> dict[str, str]:
    return {} if commit is None else {"commit": commit}
