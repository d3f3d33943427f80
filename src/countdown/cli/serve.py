"""`countdown serve`."""

from __future__ import annotations

import shlex
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countdown.cli import inputs, printing
from countdown.cli import options as o
from countdown.config import CALIBRATION_TOKENS
from countdown.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from countdown.loading import Source
    from countdown.profiles.profile import Profile

# Seconds in which those who are connected when the server stops get their answers.
DRAIN = 60
LOOPBACK = "127.0.0.1"


def serve(
    model: o.Model,
    profile: o.ProfileDir = None,
    sparsity: o.Sparsity = None,
    max_loss: Annotated[
        str | None, typer.Option(help="Calibrate first, once: let perplexity rise so far, as 2% or 0.02.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need to be said.")] = (
        LOOPBACK
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="COUNTDOWN_API_KEY", help="What clients must send. [nothing]")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model. [its folder or id]")] = None,
    sequences: Annotated[int, typer.Option(min=1, max=8, help="Answers at a time.")] = 8,
    sparse_up_to: Annotated[
        int | None,
        typer.Option(min=1, max=8, help="More answers at a time are dense. [4 with d-proxy, 8 with others]"),
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and answer. [the model's]")] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait for a place.")] = 64,
    reuse: Annotated[bool, typer.Option("--reuse", help="Do not read again how a prompt begins, if it is known.")] = (
        False
    ),
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: o.Seed = 0,
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Serve a model with OpenAI's API: chat and text completions, for one person or a few."""
    from countdown.loading import Source, load_tokenizer
    from countdown.sparsify import sparsify_

    _check_installed()
    loss = _share(max_loss)
    if loss is not None and (profile is not None or sparsity is not None):
        raise ConfigError("--max-loss finds the profile; leave out --profile and --sparsity.")
    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    settings = inputs.given_settings(sparsity, None, None, None, None, None)
    chosen = None if loss is not None else inputs.chosen(profile, None, settings, source)
    with _listening(host, port) as listener:
        tokenizer = load_tokenizer(source)
        loaded = inputs.load(source, dtype, device, seed)
        made: Any = chosen if loss is None else _within(loss, loaded, tokenizer, source)
        if made is not None:
            sparsify_(loaded, made)
            printing.say(f"sparse: {made.recipe}")
        else:
            again = shlex.join(["countdown", "serve", model, "--max-loss", "2%"])
            printing.say(f"dense: no profile; to make it sparse (calibrates once): {again}")
        how = {"sequences": sequences, "context": context, "reuse": reuse, "sparse_up_to": sparse_up_to}
        about = {"model": name or source.label, "api_key": api_key, "most_waiting": max_waiting}
        _run(loaded, tokenizer, listener, how, about)


def _run(model: nn.Module, tokenizer: Any, listener: socket.socket, how: dict[str, Any], about: dict[str, Any]) -> None:
    import uvicorn

    from countdown.engine.engine import Engine
    from countdown.engine.sampling import Sampling
    from countdown.modules import sparse_modules
    from countdown.server.app import Settings, make_app

    own = Sampling.of(model.generation_config)
    # As OpenAI's, where the checkpoint says nothing.
    sampling = own if own.temperature else own.with_(temperature=1.0)
    engine = Engine(model, tokenizer, **how)
    if sparse_modules(model) and engine.sparse_up_to < how["sequences"]:
        printing.say(f"more than {engine.sparse_up_to} answers at a time are dense (--sparse-up-to)")
    app = make_app(engine, Settings(sampling=sampling, **about))
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    printing.say(f"{about['model']}: http://{shown}:{port}/v1 (Ctrl-C stops)")
    config = uvicorn.Config(
        app, log_level="info" if o.verbose() else "warning", timeout_graceful_shutdown=DRAIN, ws="none"
    )
    uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that is bound before the model loads."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error}.") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # At once: another server that is started meanwhile is told that the port is taken.
        listener.listen(128)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}. Give another --port or --host.") from error
    return listener


def _within(loss: float, model: nn.Module, tokenizer: Any, source: Source) -> Profile:
    """Return the profile that loses so much at most, made now or in an earlier run."""
    from countdown.comparison.cache import Cache, default_folder
    from countdown.comparison.identity import environment, model_hash
    from countdown.evaluation.choice import choose
    from countdown.text import load_text

    parameter = next(model.parameters())
    about = environment(parameter.device, str(parameter.dtype).removeprefix("torch."))
    key = {"part": "serve", "model": model_hash(source), "max_loss": loss, "environment": about}
    cache = Cache(default_folder())
    cache.check()
    if (found := cache.get_profile(key)) is not None:
        printing.say("using the profile that was calibrated for this model and --max-loss before")
        return found
    printing.say("calibrating, once; the profile is kept")
    choice = choose(
        model, tokenizer, [load_text("python-docs", "calibration")], max_loss=loss, tokens=CALIBRATION_TOKENS,
        progress=o.show_progress(),
    )  # fmt: skip
    printing.say(choice.reason)
    made = choice.profile.with_name(source.label)
    cache.put_profile(key, made)
    return made


def _share(given: str | None) -> float | None:
    """Return a share that was given as 2% or 0.02."""
    if given is None:
        return None
    try:
        value = float(given.removesuffix("%")) / (100 if given.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise ConfigError(f"--max-loss is {given}, expected a share such as 2% or 0.02.")
    return value


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is missing; install it with: pip install 'countdown-llm[serve]'")
