"""A decode loop whose cost is the model's: one step from token to next token, traced once and replayed.

Hugging Face's `generate` spends part of every token in Python. This loop keeps the cache and the token on the device,
and computes the linears and the attention of a single token in kernels of ours. It takes any model that runs with a
static cache, dense or sparsified, for one sequence, greedily. The operations of a step are recorded, which takes a
second where compiling takes a minute. On a CPU they are done again in the same memory (`replay`); for a CUDA device
those that belong together are put together (`fusing`) and all are captured in a graph. Quantised models alone, whose
kernels torch makes, are compiled.

A replay does what was traced, and nothing that the model would decide in Python later on. So before the first token
a model is refused whose steps are not all alike, and the first replay must give the logits of the model's own step.

What was traced serves prompt after prompt in the same memory (`restart`); only a longer cache (`grow`) is traced anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from countdown.errors import ConfigError, CountdownError, UnsupportedModelError
from countdown.fusing.fused import Fused, fused
from countdown.loading import cache_argument, check_context
from countdown.memory import ran_out
from countdown.modules import sparse_modules
from countdown.one_token import one_token, siblings
from countdown.ops import backends  # noqa: F401  (registers the ops)
from countdown.phase import continuing, phases
from countdown.replay import Recorded, recorded
from countdown.static_cache import (
    Held,
    check_filled,
    empty,
    holders_of,
    kept_as_it_was,
    length_for,
    lengthen,
    static_cache,
    tensors_in,
    undone,
)

TILE = 512
DEVICES = ("cuda", "cpu")
# How far the logits of the first replay may be from those of the model's own step: ‖difference‖ / ‖logits‖; what shares
# nothing is 1.4 off. Of a model in float32 that is rounding, and now and then a neuron that flips at its threshold. In
# short dtypes so many flip that a random model of 8 billion weights at 80% is 1.1 off the very same model with another
# attention. So nothing is dropped there for the comparison: dense, the two are 0.09 off.
AGREEMENT = {torch.float32: 0.01}
AGREEMENT_OF_SHORT_DTYPES = 0.25


class DecodeLoop:
    """Greedy decoding of one sequence on a CUDA device or a CPU.

    Args:
        model: A causal language model of transformers on such a device, in eval mode; left as it was.
        prompt: Token ids `[1, n]`.
        new_tokens: How many tokens `run` may make.
        room: Tokens that the cache holds, prompts included; by default only those.

    Raises:
        ConfigError: On another device, several sequences, or more tokens than the model's context.
        UnsupportedModelError: The model's step cannot be recorded, or would not go on as the model does: what it keeps
            between steps, or prepares for them, is not carried; or autocast is on. The model is left as it was.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, *, new_tokens: int, room: int | None = None) -> None:
        device = next(model.parameters()).device
        if device.type not in DEVICES:
            raise ConfigError(f"the decode loop runs on {' and '.join(DEVICES)}, and the model is on {device.type}.")
        if len(prompt) != 1:
            raise ConfigError(f"the decode loop takes one sequence, and the prompt has {len(prompt)}.")
        if torch.is_autocast_enabled(device.type):
            # What it prepares once, caches and recorded steps, has the dtypes of tensors.
            raise UnsupportedModelError("the decode loop does not run under torch.autocast; load in the dtype wanted.")
        check_context(model, prompt.shape[1] + new_tokens)
        self.model, self.left = model, new_tokens
        # Where the step stands is not known before it is traced, nor after a failure.
        self._broken = True
        self._lengths: set[int] = set()  # of texts whose last step was checked
        self.room = max(prompt.shape[1] + new_tokens, room or 0)
        self._counters = [site.counters for site in sparse_modules(model).values()]
        with self._safely(), kept_as_it_was(model, only_if_it_fails=True):
            self._start(prompt.to(device))

    @contextmanager
    def _safely(self) -> Iterator[None]:
        """Compute without gradients, on the model's device; where that fails, nothing is counted."""
        device = next(self.model.parameters()).device
        try:
            # Not inference_mode: the cache is written inside compiled code and outside of it.
            with torch.no_grad(), on_device(device), undone(self._counters, only_if_it_fails=True):
                self._broken = True
                yield
                self._broken = False
        except CountdownError:
            raise
        except Exception as error:  # whatever a model's own code raises where it is not made for this
            if ran_out(error):
                raise
            raise UnsupportedModelError(
                f"{_name(self.model)} does not run in the decode loop: {_said(error)}"
            ) from error

    def _start(self, prompt: Tensor) -> None:
        """Compute the first token, and trace the step to the next."""
        _check_steps(self.model)
        self.cache, self._windows = static_cache(self.model, length_for(self.room))
        self._read(prompt)
        check_filled(self.cache, prompt.shape[1])
        # Not all models count by themselves: to Bamba each call starts at 0. Those that want to are left to it.
        given = self._prepared.step(argmax(self.logits)).get("position_ids") is not None
        self.token, self._positions = argmax(self.logits), self._prepared.positions_after(1) if given else []
        self._prepare_steps()

    def _read(self, prompt: Tensor, kept: int = 0) -> None:
        """Compute the logits behind a prompt, of which the cache holds so many tokens already."""
        self._prepared = _Prepared(self.model, self.cache, prompt)
        self._first = True
        phase = phases(self.model, "prompt") if kept and self._counters else nullcontext()
        with phase:
            self.logits = self.model(**self._prepared.prompt(kept)).logits[:, -1].clone()

    def restart(self, prompt: Tensor, *, new_tokens: int, kept: int = 0) -> None:
        """Begin another prompt in the same memory, with nothing traced anew.

        Args:
            prompt: Token ids `[1, n]`.
            new_tokens: How many tokens may follow; with the prompt they fit `room`.
            kept: So many of its tokens, fewer than all, are those that the cache holds and are not computed again;
                see `can_keep`.

        Raises:
            ConfigError: They do not fit.
            UnsupportedModelError: The model would not go on after this prompt as it did after the first.
        """
        self._check_whole()
        prompt = prompt.to(self.token.device)
        if prompt.shape[1] + new_tokens > self.room:
            raise ConfigError(f"the cache has room for {self.room} tokens, not {prompt.shape[1] + new_tokens}.")
        self.left = new_tokens
        with self._safely():
            empty(self.cache, kept)
            self._read(prompt, kept)
            self.token.copy_(argmax(self.logits))
            for positions, first in zip(self._positions, self._prepared.positions_after(1), strict=False):
                positions.copy_(first)
            # Looked at while the device computes; then it is waited for.
            stays = _are_those(tensors_in(self._holders), self._traced_in)
            check_filled(self.cache, prompt.shape[1])
            if not stays:
                self._prepare_steps()  # it works in other tensors now
            else:
                self._check_lengths()

    @property
    def can_keep(self) -> bool:
        """Whether the beginning of a text can be kept for another one: the cache holds nothing but keys and values."""
        from transformers.cache_utils import StaticLayer

        chooses = any(site.selector.from_prompt for site in sparse_modules(self.model).values())
        return not chooses and all(type(layer) is StaticLayer for layer in self.cache.layers)

    def grow(self, room: int, text: Tensor, *, new_tokens: int) -> None:
        """Make room for so many tokens in all; the step is traced anew.

        Args:
            room: Tokens that the cache holds from now on.
            text: The tokens that it holds now, `[1, n]`: the prompt, and what followed up to the token before `token`.
            new_tokens: How many may follow.

        Raises:
            ConfigError: More than the model's context.
            UnsupportedModelError: A step is another one behind as many tokens.
        """
        self._check_whole()
        check_context(self.model, room)
        text = text.to(self.token.device)
        check_filled(self.cache, text.shape[1])
        self.room, self.left = room, new_tokens
        with self._safely(), kept_as_it_was(self.model, only_if_it_fails=True):
            lengthen(self.cache, length_for(room), self._windows)
            self._prepared = _Prepared(self.model, self.cache, text)
            self._prepare_steps()

    def _prepare_steps(self) -> None:
        """Trace a step, and check that it is the model's own."""
        # Sets that the prompt chose stand beside the cache, which is the loop's own: no other prompt renews them.
        with continuing(self.model, self.cache):
            self._trace_and_check()

    def _check_lengths(self) -> None:
        """Raise UnsupportedModelError if a coming step, of a length not checked before, is prepared otherwise."""
        if self._prepared.alike:
            return
        first = self._prepared.length + 1
        coming = set(range(first, first + self.left - 1)) - self._lengths
        with self._warming_up():
            self._prepared.check_lengths(sorted(coming))
        self._lengths |= coming

    def _trace_and_check(self) -> None:
        # What warming up writes into the cache is written again by the first replays.
        self._check_lengths()
        with self._warming_up():
            self._check_windows(self.room)
        with self._warming_up(), _comparable(self.model):
            own = self._own_step()
        with self._warming_up():
            self._replay = self._trace()
        with self._warming_up(), _comparable(self.model):
            self._replay()
            _check_agreement(self.model, self._logits, own)
        self._holders = holders_of(self.model, self.cache.layers)
        self._traced_in = tensors_in(self._holders)

    @contextmanager
    def _warming_up(self) -> Iterator[None]:
        with undone([self.token, *self._positions, *self._counters]), kept_as_it_was(self.model, self.cache.layers):
            yield

    @torch.no_grad()
    def run(self, steps: int) -> Tensor:
        """Return the next tokens, int64 `[steps]`, on the device, without waiting for them.

        Raises:
            ConfigError: More steps than `new_tokens` in all.
        """
        tokens = torch.empty(steps, dtype=torch.int64, device=self.token.device)
        self._check_left(steps)
        for position in range(steps):
            self.advance()
            tokens[position] = self.token[0, 0]
        return tokens

    @torch.no_grad()
    def advance(self) -> Tensor:
        """Compute the logits that follow `token`, float `[1, vocabulary]`, and put the largest one's place there.

        What `token` is set to before the next call goes on instead. The logits are overwritten by that.

        Raises:
            ConfigError: More steps than `new_tokens` in all.
        """
        if self._begins_step():
            with on_device(self.token.device):
                self._replay()
        return self.current

    def _begins_step(self) -> bool:
        """Count a step; return whether anything is to be computed for it: the first came with the prompt."""
        self._check_whole()
        self._check_left(1)
        self.left -= 1
        first, self._first = self._first, False
        self.current: Tensor = self.logits if first else self._logits
        return not first

    def _check_whole(self) -> None:
        if self._broken:
            raise ConfigError("the decode loop failed before, and where it stands is not known: make another one.")

    def _check_left(self, steps: int) -> None:
        if steps > self.left:
            raise ConfigError(f"{steps} more tokens do not fit the cache, {self.left} are left.")

    def _check_windows(self, tokens: int) -> None:
        """Raise UnsupportedModelError if a step after so many tokens sees one that its window has left behind."""
        sliding = [layer for layer, window in self._windows if window < tokens]
        if not sliding:
            return
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(tokens - 1)
        with undone([kept[:, :, :1] for layer in sliding for kept in (layer.keys, layer.values)]):
            logits = []
            for change in (0.0, 1.0):
                for layer in sliding:
                    layer.keys[:, :, :1] += change
                    layer.values[:, :, :1] += change
                with kept_as_it_was(self.model, self.cache.layers):
                    logits.append(self._next(self.token, self._positions)[1].clone())
        if not torch.equal(*logits):
            raise UnsupportedModelError(f"{_name(self.model)} attends to tokens that its cache would let go of.")

    def _own_step(self) -> Tensor:
        """Return the logits `[1, vocabulary]` of a step as `generate` does it; keep the linears that it runs."""
        given = self._prepared.step(self.token)
        # What a step runs: linears, those that read one input together.
        self.linears, output = siblings(self.model, given)
        logits: Tensor = output.logits[:, -1].clone()
        return logits

    def _next(self, ids: Tensor, positions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the token `[1, 1]` that follows, and its logits `[1, vocabulary]`."""
        given = cache_argument(self.model, self.cache) | ({"position_ids": positions[0]} if positions else {})
        logits = self.model(input_ids=ids, **given, use_cache=True).logits[:, -1]
        return argmax(logits), logits

    def _trace(self) -> Callable[[], object]:
        # What the step is, for `joint`, None where that is compiled. It has what a graph reads and no step makes, which
        # must stay as long as the graph.
        self.traced: Recorded | Fused | None = None
        with one_token(self.model, self.linears):
            if not self.token.is_cuda:
                self.traced = recorded(self._step)
                return self.traced
            if any(type(parameter) is not nn.Parameter for parameter in self.model.parameters()):
                return self._compiled()
            step = self.traced = fused(self._step, lambda: [self._logits])

        def again() -> None:
            (self._logits,) = step()

        return captured(again)

    def _compiled(self) -> Callable[[], object]:
        """Return the step of a model whose weights are of classes of their own: quantised, they wait to be compiled."""
        following = torch.compile(self._next, fullgraph=True, dynamic=False, options=compiler_options())
        try:
            return captured(lambda: self._step(following))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UnsupportedModelError(
                f"{_name(self.model)} does not compile as one graph: {str(error).splitlines()[0]}"
            ) from error

    def _step(self, following: Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor]] | None = None) -> None:
        token, self._logits = (following or self._next)(self.token, self._positions)
        self.token.copy_(token)
        for positions in self._positions:
            positions.add_(1)


class _Prepared:
    """The inputs that `generate` prepares for a model, which some models decide on for themselves.

    Args:
        model: The model.
        cache: Its cache.
        ids: The prompt `[1, n]`.
    """

    def __init__(self, model: Any, cache: Any, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        self._cache = cache_argument(model, cache)
        takes = "position_ids" in inspect.signature(model.forward).parameters
        # `[..., n]`, or none where the model takes none.
        self._positions: list[Tensor] = [model._prepare_position_ids_for_generation(ids, {})] if takes else []
        self._keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def prompt(self, kept: int = 0) -> dict[str, Any]:
        """Return the inputs for the prompt, behind so many tokens of it that the cache holds."""
        positions = [one.clone() for one in self._positions]
        more = {"next_sequence_length": self._ids.shape[1] - kept} if kept else {"is_first_iteration": True}
        return self._of(self._ids, positions, **more)

    def step(self, token: Tensor, more: int = 1) -> dict[str, Any]:
        """Return those for a token `[1, 1]` that is so many tokens behind the prompt's last."""
        ids = torch.cat([self._ids, token.expand(1, more)], dim=1)
        steps = torch.arange(1, more + 1, dtype=ids.dtype, device=ids.device)
        positions = [torch.cat([before, before[..., -1:] + steps], dim=-1) for before in self._positions]
        return self._of(ids, positions, next_sequence_length=1)

    def positions_after(self, more: int) -> list[Tensor]:
        """Return the position `[..., 1]` of that token, none where the model takes none."""
        return [before[..., -1:] + more for before in self._positions]

    def _of(self, ids: Tensor, positions: list[Tensor], **more: Any) -> dict[str, Any]:
        more |= {"attention_mask": None, "use_cache": True} | self._cache | self._keep
        more |= {"position_ids": positions[0]} if positions else {}
        given: dict[str, Any] = self._model.prepare_inputs_for_generation(ids, **more)
        return given

    @property
    def length(self) -> int:
        """How many tokens the prompt has."""
        return self._ids.shape[1]

    @property
    def alike(self) -> bool:
        """Whether the steps to texts of all lengths are prepared alike: as most models leave it to be."""
        from transformers import GenerationMixin

        return type(self._model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation

    def check_lengths(self, lengths: Iterable[int]) -> None:
        """Raise UnsupportedModelError if a model prepares the step to a text so long otherwise than the first.

        Phi-3 lets go of its cache, say, where its rotations change.
        """
        (cache,) = self._cache.values()
        filled = [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]
        for length in lengths:
            more = length - self.length
            for of_layer in filled:
                of_layer.fill_(length - 1)
            given = self.step(self._ids[:, -1:], more)
            kept = any(value is cache for value in given.values())
            if not kept or given["input_ids"].shape[1] != 1:
                raise UnsupportedModelError(
                    f"{_name(self._model)} starts again without its cache at token {self._ids.shape[1] + more}."
                )
            positions = given.get("position_ids")
            if positions is not None and not all(torch.equal(positions, one) for one in self.positions_after(more)):
                raise UnsupportedModelError(f"{_name(self._model)} counts positions otherwise than one by one.")


def _are_those(found: Sequence[Held], before: Sequence[Held]) -> bool:
    """Return whether the same tensors are held."""
    return len(found) == len(before) and all(one[-1] is other[-1] for one, other in zip(found, before, strict=True))


def _check_steps(model: Any) -> None:
    """Raise UnsupportedModelError if a model's steps are known to differ, or to be no steps of one sequence."""
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{_name(model)} has an encoder, which the decode loop does not run.")
    for name, module in model.named_modules():
        kinds = vars(module).get("rope_type", "")
        if "dynamic" in (kinds.values() if isinstance(kinds, dict) else (kinds,)):
            raise UnsupportedModelError(f"{_name(model)} computes its rotations anew as a text grows ({name}).")


@contextmanager
def _comparable(model: nn.Module) -> Iterator[None]:
    """Within the context nothing is dropped by a threshold in short dtypes, where rounding would flip many terms."""
    sites = [site for site in sparse_modules(model).values() if site.method.decision == "threshold"]
    thresholds = [site.per_term for site in sites if next(site.parameters()).dtype not in AGREEMENT]
    with undone(thresholds):
        for of_site in thresholds:
            of_site.fill_(-1)
        yield


def _check_agreement(model: Any, logits: Tensor, own: Tensor) -> None:
    """Raise UnsupportedModelError if the logits of a replay are not those of the model's own step."""
    difference = float((logits.float() - own.float()).norm() / own.float().norm())
    if not difference <= AGREEMENT.get(own.dtype, AGREEMENT_OF_SHORT_DTYPES):
        raise UnsupportedModelError(
            f"{_name(model)} computes something else in the decode loop: its first logits are {difference:.0%} off."
        )


def _name(model: Any) -> str:
    return type(model).__name__


def _said(error: Exception) -> str:
    """Return what an error says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


def compiler_options() -> dict[str, Any]:
    """Return what the compiler can do besides, where this torch can.

    Small kernels that do not wait for each other become one, and on Hopper and later they start while the one before
    ends, as ours do.
    """
    from torch._inductor import config

    hopper = bool(torch.version.cuda) and torch.cuda.get_device_capability() >= (9, 0)
    wanted = {"combo_kernels": True, "triton.enable_pdl": hopper}
    return {name: value for name, value in wanted.items() if name in config.get_config_copy()}


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context within which streams and graphs are those of `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """Return what replays `step` as a graph, after a run that compiles its kernels."""
    graph = record(step)
    between = torch.zeros(1, dtype=torch.float32, device="cuda")

    def replay() -> None:
        # On an H200 the sparse sums of a graph take longer right behind another graph, or behind a launch that depends
        # on the one before, than behind a kernel of the usual kind.
        between.add_(1)
        graph.replay()

    return replay


def record(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return `step` as a graph, after a run that compiles its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # for what the step reads
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def argmax(logits: Tensor) -> Tensor:
    """Return the place of the largest logit `[1, 1]` of `[1, vocabulary]`."""
    if logits.is_cuda:
        largest: Tensor = torch.ops.countdown.largest_one(logits)
        return largest
    # In two stages, of which the first is one of the small operations that the CPU's library knows.
    missing = -logits.shape[1] % TILE
    tiles = (F.pad(logits, (0, missing), value=float("-inf")) if missing else logits).view(-1, TILE)
    tile = tiles.amax(dim=-1).argmax(dim=0, keepdim=True)
    place: Tensor = tile * TILE + tiles.index_select(0, tile).argmax(dim=-1)
    return place.view(1, 1)
