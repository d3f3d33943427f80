"""`countdown compare`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from countdown.cli import options as o
from countdown.cli import printing

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        callback=o.known_methods,
        help="Method, with settings as NAME:weighting=rms, or a recipe file; may be repeated. [the usual ones]",
    ),
]
Sparsities = Annotated[list[float] | None, typer.Option("--sparsity", help="Share to skip; may be repeated.")]
MaxLoss = Annotated[float | None, typer.Option(help="Recommend what lets perplexity rise so far: 0.02 for 2%.")]
MinSpeedup = Annotated[float | None, typer.Option(help="Recommend what is so many times as fast as dense.")]
Tasks = Annotated[str | None, typer.Option(help="Score tasks of lm-eval, too, such as piqa,arc_easy.")]
Quantised = Annotated[bool, typer.Option(help="Measure the dense model quantised, too (torchao).")]
Commit = Annotated[str | None, typer.Option(help="Commit of this checkout, for the results file.")]


def compare(
    model: o.Model,
    output: Annotated[Path | None, o.path("-o", "--output", help="Folder to make or extend. [NAME-comparison]")] = None,
    methods: Methods = None,
    sparsity: Sparsities = None,
    max_loss: MaxLoss = None,
    min_speedup: MinSpeedup = None,
    quantised: Quantised = True,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Measure no speed; go by bytes.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less: rough numbers, soon.")] = False,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of 512 tokens to score. [12; 4 if --quick]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to calibrate on. [16384; 2048 if --quick]")] = None,
    text: Annotated[str, typer.Option(help=o.TEXT_HELP)] = "python-docs",
    text_dir: o.TextDir = None,
    prompt: Annotated[str | None, typer.Option(help="What every configuration answers.")] = None,
    tasks: Tasks = None,
    tasks_dir: o.TasksDir = None,
    limit: o.Limit = None,
    batch_size: o.BatchSize = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all again, whatever was measured before.")] = False,
    overwrite: o.Overwrite = False,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    json: o.Json = None,
    commit: Commit = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure methods at sparsities, dense and quantised: quality and speed here, and what to take."""
    from countdown.comparison.compare import compare as run
    from countdown.comparison.session import PROMPT
    from countdown.loading import Source

    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    folder = output or Path(f"{source.label.rpartition('/')[2]}-comparison")
    o.quieten_lm_eval()
    with _stoppable():
        found = run(
            model,
            methods=methods,
            sparsities=sparsity,
            max_loss=max_loss,
            min_speedup=min_speedup,
            quantised=quantised,
            speed=not no_speed,
            quick=quick,
            windows=windows,
            tokens=tokens,
            text=text,
            text_dir=text_dir,
            prompt=PROMPT if prompt is None else prompt,
            tasks=tasks,
            tasks_dir=tasks_dir,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output=folder,
            overwrite=overwrite,
            fresh=fresh,
            progress=o.show_progress(),
            say=printing.say if o.show_progress() else lambda _: None,
            on_cell=printing.say_cell if o.show_progress() else lambda _: None,
            facts={} if commit is None else {"commit": commit},
        )
    printing.emit(json, found.document())
    printing.print_comparison(printing.table_console(json), found)
    printing.say(f"written to {folder}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within the context, say of an interrupt that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        printing.say("stopped: what was measured is kept, and the same command goes on from there.")
        raise
