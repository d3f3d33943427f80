"""`countdown chat`."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countdown.cli import inputs, printing
from countdown.cli import options as o
from countdown.errors import ConfigError, CountdownError

if TYPE_CHECKING:
    from torch import nn

    from countdown.engine.conversation import Conversation, Turn
    from countdown.profiles.profile import Profile

HELP = """/system TEXT    what the model is told first; without TEXT, nothing
/reset          forget the turns
/sparsity X     skip the share X (0 to 1) from now on, with a profile; 0 is dense
/help           this
/exit           leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: o.Model,
    profile: o.ProfileDir = None,
    sparsity: o.Sparsity = None,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens in an answer.")] = 1024,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of all turns together. [the model's]")] = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens each time.")] = None,
    revision: o.Revision = None,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Chat with a model in the terminal; it sees what was said before. /help lists what else it takes."""
    from countdown.engine.sampling import Sampling
    from countdown.loading import Source, load_tokenizer
    from countdown.sparsify import sparsify_

    source = Source.parse(model, revision=revision, trust_remote_code=trust_remote_code)
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    Sampling().with_(**given)  # what is wrong shows before the model loads
    settings = inputs.given_settings(sparsity, None, None, None, None, None)
    chosen: Any = inputs.chosen(profile, None, settings, source)
    tokenizer = load_tokenizer(source)
    loaded = inputs.load(source, dtype, device, 0)
    if chosen is not None:
        sparsify_(loaded, chosen)
    sampling = Sampling.of(loaded.generation_config).with_(**given)
    inputs.check_drawn(given, sampling.temperature)
    about = {"sampling": sampling, "system": system, "max_new_tokens": max_new_tokens}
    _Chat(loaded, tokenizer, chosen, context, about).run()


@dataclass
class _Chat:
    """A chat in a terminal, or with what is piped in.

    Args:
        model: Sparse if there is a profile.
        tokenizer: Its tokenizer.
        profile: Whose sparsity can be changed; None for a dense model.
        context: See `Engine`.
        about: See `Conversation`.
    """

    model: nn.Module
    tokenizer: Any
    profile: Profile | None
    context: int | None
    about: dict[str, Any]
    conversation: Conversation = field(init=False)

    def __post_init__(self) -> None:
        from countdown.engine.conversation import Conversation

        self.conversation = Conversation(self._engine(), **self.about)

    def _engine(self) -> Any:
        from countdown.engine.engine import Engine

        return Engine(self.model, self.tokenizer, context=self.context, reuse=True)

    def run(self) -> None:
        """Read lines until there are no more."""
        with suppress(ImportError):
            import readline  # noqa: F401  (input edits lines, and has a history)
        printing.say("sparse: " + str(self.profile.recipe) if self.profile else "dense")
        printing.say("/help lists commands; Ctrl-D leaves")
        while (line := _read()) is not None and line not in ("/exit", "/quit"):
            try:
                self._take(line)
            except CountdownError as error:
                printing.say(str(error))
            except KeyboardInterrupt:
                printing.say("\n(stopped)")

    def _take(self, line: str) -> None:
        if not line:
            return
        word, _, rest = line.partition(" ")
        if not word.startswith("/"):
            self._answer(line)
        elif word == "/help":
            printing.say(HELP)
        elif word == "/reset":
            self.conversation.reset()
            printing.say("forgotten")
        elif word == "/system":
            self.conversation.system = rest.strip()
            printing.say("the system message is " + (f"now: {rest.strip()}" if rest.strip() else "gone"))
        elif word == "/sparsity":
            self._sparsify(rest.strip())
        else:
            raise ConfigError(f"there is no {word}; /help lists what there is.")

    def _answer(self, text: str) -> None:
        from countdown.modules import sparse_modules
        from countdown.sparsify import realised_sparsity, reset_counters

        sparse = bool(sparse_modules(self.model))
        if sparse:
            reset_counters(self.model)
        turn = self.conversation.ask(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
        share = realised_sparsity(self.model) if sparse else None
        if o.show_progress():
            printing.say(_speeds(turn, share))

    def _sparsify(self, given: str) -> None:
        from countdown.sparsify import restore_, sparsify_

        if self.profile is None:
            raise ConfigError("the model is dense and has no profile: start with --profile (see countdown calibrate).")
        try:
            changed = self.profile.with_settings(sparsity=float(given))
        except ValueError as error:
            reason = str(error) if isinstance(error, CountdownError) else f"{given!r} is no share such as 0.5."
            raise ConfigError(f"/sparsity: {reason}") from error
        self.conversation.engine.close()
        try:
            sparsify_(restore_(self.model), changed)
            self.profile = changed
        finally:
            self.conversation.engine = self._engine()
        printing.say(f"sparse: {changed.recipe}")


def _read() -> str | None:
    """Return the next line, None when there is none."""
    try:
        # Of a prompt where nobody types there is no use.
        return input("> " if sys.stdin is not None and sys.stdin.isatty() else "").strip()
    except (EOFError, RuntimeError):  # the second where stdin is closed
        return None
    except KeyboardInterrupt:
        typer.echo()
        return ""


def _speeds(turn: Turn, realised: float | None) -> str:
    """Return in a line how fast an answer was."""
    answer = turn.answer
    parts = [f"{len(answer.tokens)} tokens"]
    if turn.tokens_per_s:
        parts.append(f"{turn.tokens_per_s:.1f} tokens/s")
    parts.append(f"first after {turn.first_s:.2f} s")
    if answer.reused:
        parts.append(f"{answer.reused} of {len(answer.request.prompt)} prompt tokens known")
    if realised is not None:
        parts.append(f"realised sparsity {realised:.0%}")
    if turn.dropped:
        parts.append(f"{turn.dropped} earlier messages no longer fit")
    return f"({', '.join(parts)})"
