"""A model in the decode loop, and what is timed of it: tokens, prompts, and the parts of a token."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from countdown.benchmark.speedup import paired
from countdown.benchmark.timing import Rounds, in_turn, timed, wait
from countdown.decoding import DecodeLoop, argmax, on_device
from countdown.modules import sparse_modules
from countdown.phase import continuing
from countdown.replay import recorded
from countdown.sites import SITES, find_parts
from countdown.sparsify import reset_counters, status
from countdown.static_cache import undone
from countdown.sums.activations import ACTIVATIONS

# By type of device, the tokens of a prompt that is timed.
PREFILL = {"cuda": 2048, "cpu": 512}
# The tokens that are timed come in parts; between two parts of one arm, others have their turn.
ROUNDS = 8
# What comes before the rounds that count.
WARM_UP = 1
# More rounds come, with the same tokens again, until the speed-ups are known well or it takes too long.
USUAL = Rounds(ROUNDS, 5 * ROUNDS, most_s=60.0)
TOKEN, PROMPT = "token", "prompt"
Times = Mapping[str, list[float]]
_RATE = ("memory", "bytes/s")


class Timed(Protocol):
    """What takes part in the rounds."""

    def runs(self) -> dict[str, Callable[[], float]]:
        """Return calls that measure once, in µs, by what they measure; `TOKEN` is one of them."""

    def record(self, times: Times, dense: Times) -> dict[str, Any]:
        """Return what was measured, and against the dense model.

        Args:
            times: What the arm's own runs measured, round by round.
            dense: What those of the dense model did.
        """


class Arm:
    """A model in the decode loop: dense, sparsified or quantised.

    Args:
        model: On a CUDA device or a CPU; it stays as it is, but counts its tokens anew.
        ids: The prompt `[1, n]`.
        new_tokens: How many tokens are timed, at least.
        prefill: Time a prompt as well.
        split: Time the parts of a token as well, which takes linears that are plain.

    Raises:
        ConfigError, UnsupportedModelError: See `DecodeLoop`.
    """

    def __init__(
        self, model: nn.Module, ids: Tensor, new_tokens: int, *, prefill: bool = False, split: bool = False
    ) -> None:
        self.model, self.ids, self.new_tokens = model, ids, new_tokens
        started = time.perf_counter()
        self.loop = self._begun()
        self.compile_s = time.perf_counter() - started
        if sparse_modules(model):
            reset_counters(model)  # what it computed before is not of these tokens
        self._prefill, self._split = prefill, split and _splits(model)

    def alone(self) -> Arm:
        """Return the same loop, of which only tokens are timed."""
        other = copy.copy(self)
        other._prefill = other._split = False
        return other

    @torch.no_grad()
    def runs(self) -> dict[str, Callable[[], float]]:
        device = self.ids.device
        found = {TOKEN: token_run(self._tokens, part_of(self.new_tokens), device)}
        if self._prefill:
            found[PROMPT] = self._prompt_run()
        # Timed as a part, an FFN must not count what it computes.
        counters = [site.counters for site in sparse_modules(self.model).values()]
        if self._split:
            with on_device(device), undone(counters):
                parts = {name: timed(step, device) for name, step in _parts(self.model, self.loop, self.ids)}
            found |= {name: _second(run, counters) for name, run in parts.items()}
        return found

    def record(self, times: Times, dense: Times) -> dict[str, Any]:
        found = {
            "compile_s": self.compile_s,
            "time_us": median(times[TOKEN]),
            "split_us": _split(times) if self._split else {},
            **speeds(times[TOKEN], dense[TOKEN]),
        }
        if self._prefill:
            found["prefill_ms"] = median(times[PROMPT]) / 1e3
            found["prefill_ratio"] = paired(times[PROMPT], dense[PROMPT]).value
        return found | (_counted(self.model) if sparse_modules(self.model) else {})

    def _tokens(self, steps: int) -> None:
        """Make so many tokens, those after the prompt again where there is no room for more."""
        if steps > self.loop.left:
            del self.loop  # before another takes as much memory
            counters = [site.counters for site in sparse_modules(self.model).values()]
            with undone(counters):  # of what is timed alone
                self.loop = self._begun()
        self.loop.run(steps)

    def _begun(self) -> DecodeLoop:
        loop = DecodeLoop(self.model, self.ids, new_tokens=tokens_of(self.new_tokens))
        loop.run(1)  # came with the prompt: no time of a token
        return loop

    def _prompt_run(self) -> Callable[[], float]:
        tokens, device = PREFILL[self.ids.device.type], self.ids.device
        prompt = self.ids.repeat(1, -(-tokens // self.ids.shape[1]))[:, :tokens]

        @torch.no_grad()
        def run() -> float:
            wait(device)
            started = time.perf_counter()
            self.model(prompt, use_cache=False, logits_to_keep=1)
            wait(device)
            return (time.perf_counter() - started) * 1e6

        return run


@torch.no_grad()
def measure(
    arms: Mapping[str, Timed],
    rate: Callable[[], float] | None = None,
    *,
    rounds: Rounds = USUAL,
    label: str = "",
) -> tuple[dict[str, Times], list[float]]:
    """Return what was measured of each arm, round by round, the arms in turn.

    All measure one thing, then all the next: what is compared is so little apart that a machine seldom changes between.
    Rounds are added until it is known well enough how many times as fast as the first arm each of the others is.

    Args:
        arms: By name.
        rate: Measures the memory's bandwidth once.
        rounds: How many.
        label: What is shown as progress on stderr; nothing if empty.

    Returns:
        By arm and by what was measured, µs of each round; and the bandwidths, none without `rate`.
    """
    runs: dict[tuple[str, str], Callable[[], float]] = {} if rate is None else {_RATE: rate}
    of_arms = {name: arm.runs() for name, arm in arms.items()}
    measured = dict.fromkeys(name for of_arm in of_arms.values() for name in of_arm)
    runs |= {(arm, name): of_arm[name] for name in measured for arm, of_arm in of_arms.items() if name in of_arm}
    first, *others = arms

    def enough(found: Mapping[tuple[str, str], list[float]]) -> bool:
        return all(paired(found[first, TOKEN], found[other, TOKEN]).narrow for other in others)

    found = in_turn(runs, rounds, warm_up=WARM_UP, enough=enough, label=label)
    rates = found.pop(_RATE, [])
    return {name: {what: one for (arm, what), one in found.items() if arm == name} for name in arms}, rates


def speeds(token: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """Return tokens/s, and how many times as fast as dense that is.

    Args:
        token: µs of a token, round by round.
        dense: Of the dense model, in the same rounds.

    Returns:
        `tokens_per_s`; `speedup` with the ends of its interval, `speedup_low` and `speedup_high`; and what the dense
        model made in these rounds, `dense_tokens_per_s`: the one over the other, so that the three agree.
    """
    found, rate = paired(dense, token), 1e6 / median(token)
    return {
        "tokens_per_s": rate,
        "dense_tokens_per_s": rate / found.value,
        "speedup": found.value,
        "speedup_low": found.low,
        "speedup_high": found.high,
    }


def free() -> None:
    """Return the memory of arms that are gone: compiled code and graphs hold on to it."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def part_of(new_tokens: int) -> int:
    """Return how many tokens are timed in a round, for so many in all."""
    return -(-new_tokens // ROUNDS)


def tokens_of(new_tokens: int) -> int:
    """Return how many tokens an arm makes: one that comes with the prompt, those of `ROUNDS` rounds and of the warm-up,
    and in each one that is not timed.
    """
    return 1 + (WARM_UP + ROUNDS) * (1 + part_of(new_tokens))


def token_run(run: Callable[[int], object], tokens: int, device: torch.device) -> Callable[[], float]:
    """Return a call that makes some tokens and returns the µs of one.

    Args:
        run: Makes so many tokens.
        tokens: How many are timed; one before them is not, in which threads wake up.
        device: Where.
    """

    def once() -> float:
        run(1)
        wait(device)
        started = time.perf_counter()
        run(tokens)
        wait(device)
        return (time.perf_counter() - started) / tokens * 1e6

    return once


def _second(run: Callable[[], float], tensors: Sequence[Tensor]) -> Callable[[], float]:
    """Return a call that runs twice, and returns what the second measured: threads are awake. It leaves `tensors`."""

    def once() -> float:
        with undone(tensors):
            run()
            return run()

    return once


def _split(times: Times) -> dict[str, float]:
    """Return the µs of the parts of a token, and of the rest; empty where they do not tell.

    Each part is a share of the token of its own round, so that a machine that slows down makes none larger. Parts are
    timed one by one: where other work came between, they may come to more than the token, and there is no rest to tell.
    """
    token = median(times[TOKEN])
    shares = {
        name: median(part / whole for part, whole in zip(found, times[TOKEN], strict=True))
        for name, found in times.items()
        if name not in (TOKEN, PROMPT)
    }
    rest = 1 - sum(shares.values())
    return {name: share * token for name, share in (shares | {"rest": rest}).items()} if rest >= 0 else {}


def _counted(model: nn.Module) -> dict[str, Any]:
    """Return what the tokens of the loop realised."""
    sites = status(model)
    size = sum(site.size for site in sites)
    realised = sum((site.realised_sparsity or 0.0) * site.size for site in sites) / size
    return {
        "realised_sparsity": realised,
        "backend": ", ".join(dict.fromkeys(site.backend for site in sites)),
        "weights_read_by_site": {site.name: site.weights_read for site in sites},
    }


def _splits(model: nn.Module) -> bool:
    """Return whether a token's time can be split up: what is sparse, or would be, are whole parts of it."""
    parts = {kind.site.sum_class.kind for kind in SITES if kind.part}
    sparse = {module.kind for module in sparse_modules(model).values()}
    return sparse <= parts if sparse else bool(find_parts(model))


def _parts(model: nn.Module, loop: DecodeLoop, ids: Tensor) -> Iterable[tuple[str, Callable[[], object]]]:
    """Return steps through the FFNs of a token, the linears of attention, and the head.

    Each part is timed by itself, captured or recorded, with the kernels of the step and the inputs that the prompt's
    last token gave it; the rest is what remains of the total: scores, cache, norms, and the gaps between kernels.
    """
    groups: list[list[Any]] = loop.linears
    sparse = sparse_modules(model)
    sites = [] if sparse else find_parts(model)
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    inputs = _last_inputs(model, ids, [*sparse.values(), *(linear for group in groups for linear in group)])
    # Of each dense FFN, gate and up in one group or one linear, and down.
    dense = [[group for group in groups if group[0] in set(site.module.modules())] for site in sites]
    taken = {id(group[0]) for groups_ in dense for group in groups_} | {id(head)}
    attention = [group for group in groups if id(group[0]) not in taken]

    def run_ffns() -> None:
        with continuing(model, loop.cache):
            for module in sparse.values():
                module.sparse(inputs[id(module)][None])
        for site, (first, last) in zip(sites, dense, strict=True):
            _gated(site.sum, first, inputs)
            _project(last, inputs)

    def run_linears() -> None:
        for group in attention:
            _project(group, inputs)

    steps = {"ffn": run_ffns, "attention_linears": run_linears, "head": lambda: argmax(_project([head], inputs))}
    return [(name, step if ids.is_cuda else recorded(step, everything=True)) for name, step in steps.items()]


def _last_inputs(model: nn.Module, ids: Tensor, modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Return, by identity of the module, its input `[1, d]` at the last token of a prompt."""
    inputs: dict[int, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[id(module)] = arguments[0].reshape(-1, arguments[0].shape[-1])[-1:].clone()

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _gated(ffn: Any, group: list[nn.Linear], inputs: dict[int, Tensor]) -> Tensor:
    """The activated projections of an FFN, as the loop computes them: on a GPU with what is activated."""
    x = inputs[id(group[0])]
    if x.is_cuda:
        weights = [weight.parts[0] for weight in ffn.weights[:2]]
        return torch.ops.countdown.gated(x, weights, ffn.biases[:2], ffn.activation)  # type: ignore[no-any-return]
    g, u = _project(group, inputs).chunk(2, dim=-1)
    return ACTIVATIONS[ffn.activation](g) * u


def _project(group: list[nn.Linear], inputs: dict[int, Tensor]) -> Tensor:
    weights, biases = [linear.weight for linear in group], [linear.bias for linear in group]
    return torch.ops.countdown.project(inputs[id(group[0])], weights, biases)  # type: ignore[no-any-return]
