"""One FFN: dense against sparse, by shape, method, sparsity and tokens, with random weights."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.artifacts import Artifacts
from countdown.benchmark.speedup import paired
from countdown.benchmark.timing import floor_rate, in_turn, relative_error, require_cuda, timed
from countdown.config import check_choice
from countdown.errors import ConfigError
from countdown.loading import DTYPES
from countdown.methods import DEFAULT_METHOD, Method, method, method_names
from countdown.ops import backends
from countdown.ops.reference import size_of
from countdown.profiles.recipe import Recipe
from countdown.progress import Steps, say
from countdown.replay import recorded
from countdown.selectors import Selector
from countdown.sums.activations import ACTIVATIONS
from countdown.sums.gated import Gated
from countdown.weights import Plain, Weight
from countdown.weights.symmetric import quantise

GIVEN = "given"  # in place of a method: the active set is known, gate, up and down are read at it
FUSED = "cuBLAS, gate and up fused"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# Weights that a replay reads, by type of device: so many times the cache that nothing stays in it. On a CPU, whose
# kernels take milliseconds, fewer.
CACHE_TIMES = {"cuda": 25, "cpu": 4}
MOST_LAYERS = 512
# Settings of methods that change what runs.
SETTINGS = ("compensate", "second_look")
# Relative errors of sums in float32 that should decide nothing at a threshold: a wide one and a likely one.
SUMMING_ERRORS = (1e-5, 1e-6)


@dataclass(frozen=True)
class FFNBenchmark:
    """What to measure.

    Args:
        shapes: (d, h) of each FFN.
        methods: Names of methods that decide by one projection or by a proxy, with what they predict if anything
            (`d-proxy:compensate=affine`) and their second look if they have one (`m-countdown:second_look=0.15`), or
            `given`. [all of them, and `given`]
        sparsities: Shares of inactive neurons, of every token; 1 is the decision alone.
        tokens: Tokens in a call, 1 to 8.
        union: By number of tokens, the share of neurons that some token of a call needs; inputs of the tokens are
            correlated until theirs share so much. Without it tokens are independent.
        dtype: `bfloat16`, `float16` or `float32`.
        activation: A key of `ops.activations.ACTIVATIONS`.
        device: Where; a CUDA device if None.
        compiled: Measure torch.compile (max-autotune) of the dense FFN as well; takes half a minute a shape.

    Raises:
        ConfigError: A setting is out of range.
    """

    shapes: Sequence[tuple[int, int]]
    methods: Sequence[str] = field(default_factory=lambda: [*measurable(), GIVEN])
    sparsities: Sequence[float] = (0.0, 0.5, 0.7, 0.8, 0.9)
    tokens: Sequence[int] = (1,)
    union: Mapping[tuple[int, float], float] | None = None
    dtype: str = "bfloat16"
    activation: str = "silu"
    device: torch.device | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("activation", self.activation, ACTIVATIONS)
        for name in self.methods:
            if name != GIVEN and not _has_kernel(_parsed(name)):
                raise ConfigError(
                    f"{name} decides neither by one projection of an FFN nor by a proxy; there is no kernel to measure."
                )
        if any(not 0 <= sparsity <= 1 for sparsity in self.sparsities):
            raise ConfigError(f"sparsities are {list(self.sparsities)}, expected 0 ≤ sparsity ≤ 1.")
        if any(not 1 <= count <= 8 for count in self.tokens):
            raise ConfigError(f"tokens are {list(self.tokens)}, expected 1 to 8.")
        backend = "triton" if self.device is None or self.device.type == "cuda" else "cpu"
        if missing := backends.missing(backend):
            raise ConfigError(f"there are no kernels to measure: {missing}.")


def measurable() -> list[str]:
    """Return the methods that decide by one projection of an FFN or by a proxy, for which there are kernels."""
    return [name for name in method_names() if _has_kernel(method(name))]


def _parsed(name: str) -> Method:
    """Return the method that a name on the command line stands for, `NAME` or with settings that change what runs.

    Raises:
        ConfigError: It is a recipe of several, or has settings that make no difference here.
    """
    entries = Recipe.parse(name).entries
    config = entries[0].method
    settings = {name: getattr(config, name) for name in SETTINGS if config.has(name)}
    if len(entries) > 1 or config != method(config.name, **settings):
        raise ConfigError(
            f"'{name}' is more than a method with {' or '.join(SETTINGS)} (`d-proxy:compensate=affine`); "
            "`benchmark decode` measures others."
        )
    return config


def _has_kernel(config: Method) -> bool:
    if config.kind != Gated.kind:
        return False
    return len(config.selector.reads) == 1 or config.selector.indicator == "proxy"


def run(benchmark: FFNBenchmark, *, progress: bool = True) -> Iterator[dict[str, Any]]:
    """Yield a record for each configuration; see docs/speed.md for the protocol.

    Raises:
        ConfigError: No CUDA device, where none is named.
    """
    rate = floor_rate(benchmark.device or require_cuda())
    steps = Steps([shape for shape in benchmark.shapes for _ in benchmark.tokens])
    for d, h in benchmark.shapes:
        layers = _Layers(d, h, benchmark)
        for tokens in benchmark.tokens:
            label = f"measuring FFNs of {d} × {h}, tokens in a call: {tokens} ({steps})" if progress else ""
            if progress:
                say(label)
            with steps.step((d, h)):
                records = list(_measure(layers, tokens, rate, label))
            yield from records


def _measure(layers: _Layers, tokens: int, rate: Callable[[], float], label: str) -> Iterator[dict[str, Any]]:
    """Yield the records of so many tokens, what is dense and all cases timed in turn; progress is called `label`."""
    cases: list[_Given | _Deciding] = []
    for sparsity in layers.benchmark.sparsities:
        x = layers.inputs(tokens, sparsity)
        for name in layers.benchmark.methods:
            cases.append(
                _Given(layers, sparsity, x) if name == GIVEN else _Deciding(layers, _parsed(name), sparsity, x)
            )
    # What computes wrong is not timed.
    errors = {case: case.error() for case in cases}
    right = [case for case in cases if errors[case] <= TOLERANCE[layers.dtype]]
    dense = layers.dense(tokens, compiled=layers.benchmark.compiled and tokens == 1)
    steps: dict[Any, Callable[[], object]] = {**dense, **{case: _again(case.step, layers.device) for case in right}}
    runs = {_RATE: rate, **{name: timed(step, layers.device) for name, step in steps.items()}}
    found = in_turn(runs, label=label)
    bytes_s = statistics.median(found.pop(_RATE))
    times = {name: [time / layers.count for time in measured] for name, measured in found.items()}
    for case in cases:
        record = _described(case, bytes_s) | {"error": errors[case]}
        yield record | _compared(case, times, list(dense), record["floor_us"])


_RATE = "bytes/s"


def _again(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a step as a loop runs it: recorded on a CPU, so that no Python is timed; `timed` captures a GPU's."""
    return step if device.type == "cuda" else recorded(step, everything=True)


def _described(case: _Given | _Deciding, bytes_s: float) -> dict[str, Any]:
    """Return what a case is, and its floor."""
    layers, x = case.layers, case.x
    *others, union = case.unions()
    # In matrices: what is read to decide, W_down at active neurons, and the others at those that the first look leaves.
    matrices = case.decides + union + (2 - case.reused) * (others[0] if others else union)
    return {
        "d": layers.d,
        "h": layers.h,
        "dtype": layers.benchmark.dtype,
        "activation": layers.benchmark.activation,
        "layers": layers.count,
        **({} if x.is_cuda else {"threads": torch.get_num_threads()}),
        "tokens": len(x),
        "method": case.name,
        "compensate": case.compensate,
        "second_look": case.second_look,
        "indicator": case.indicator,
        "decision": "threshold",
        "sparsity": case.sparsity,
        "realised_sparsity": case.realised(),
        "union": union,
        "weights_read": matrices / 3,
        "bandwidth": bytes_s,
        "floor_us": matrices * layers.d * layers.h * x.element_size() / bytes_s * 1e6,
    }


def _compared(
    case: _Given | _Deciding, times: Mapping[Any, list[float]], dense: Sequence[str], floor: float
) -> dict[str, Any]:
    """Return how long dense FFNs took, in µs, and the case, if it was timed, against the fastest of them."""
    medians = {name: statistics.median(times[name]) for name in dense}
    variant = min(medians, key=lambda name: medians[name])
    found = {"dense_variant": variant, "dense_time_us": medians[variant], "dense_times_us": medians}
    if case not in times:
        return found
    time, speedup = statistics.median(times[case]), paired(times[variant], times[case])
    return found | {
        "time_us": time,
        "speedup": speedup.value,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        **({"speedup_to_fused_cublas": paired(times[FUSED], times[case]).value} if FUSED in medians else {}),
        "floor_share": floor / time,
    }


def _sizes(device: torch.device) -> tuple[int, int]:
    """Return how many bytes of weights are to be read, and how many fit."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        return CACHE_TIMES["cuda"] * cache, torch.cuda.mem_get_info(device)[0]
    cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return CACHE_TIMES["cpu"] * max(cache, 32 * 2**20), free


class _Layers:
    """So many FFNs of one shape with random weights that they do not fit the cache, gate and up in one matrix."""

    def __init__(self, d: int, h: int, benchmark: FFNBenchmark) -> None:
        self.d, self.h, self.benchmark = d, h, benchmark
        self.device, self.dtype = benchmark.device or require_cuda(), DTYPES[benchmark.dtype]
        self.generator = torch.Generator(self.device).manual_seed(0)
        # At the highest sparsity a decision reads a tenth of an FFN or more.
        least = max(1 - max(benchmark.sparsities), 0.1) * 3 * d * h * self.dtype.itemsize
        wanted, free = _sizes(self.device)
        # On a CPU W_down is there twice; see `dense`.
        fit = int(0.7 * free / ((3 if self.device.type == "cuda" else 4) * d * h * self.dtype.itemsize))
        if fit < 1:
            raise ConfigError(f"an FFN of {d} × {h} in {benchmark.dtype} does not fit the {free / 1e9:.0f} GB left.")
        self.count = min(-(-wanted // max(1, int(least))), MOST_LAYERS, fit)
        self.both = [self._draw(2 * h, d) for _ in range(self.count)]
        self.down = [self._draw(h, d).t() for _ in range(self.count)]
        self._parts: dict[tuple[Selector, str], list[Sequence[Weight]]] = {}

    def sum(self, layer: int) -> Gated:
        """What a layer computes."""
        weights = (self.both[layer][: self.h], self.both[layer][self.h :], self.down[layer])
        return Gated([Plain([weight]) for weight in weights], [None] * 3, self.benchmark.activation)

    def parts(self, selector: Selector, compensation: str) -> list[Sequence[Weight]]:
        """The weights of every layer that selector and compensation have: made for inputs that are all as large, and
        random ones.
        """
        key = selector, compensation
        if key not in self._parts:
            even = {one.name: torch.ones(self.d, device=self.device, dtype=torch.float32) for one in selector.artifacts}
            self._parts[key] = [self._laid_out(self.sum(n), selector, even, compensation) for n in range(self.count)]
        return self._parts[key]

    def _laid_out(self, sum_: Gated, selector: Selector, artifacts: Artifacts, compensation: str) -> Sequence[Weight]:
        parts = [*selector.make(sum_, artifacts), *(self._predicting() if compensation else ())]
        own = len(selector.shapes(self.d, self.h))
        chosen = backends.choose(sum_, selector, parts[:own], "threshold", compensation=compensation)
        return chosen.lay_out(sum_, parts)[1]

    def _predicting(self) -> Sequence[Weight]:
        """Return random weights for `compensation.affine`."""
        ones = torch.ones(self.d, device=self.device, dtype=torch.float32)
        matrix = quantise(self._draw(self.d, self.d).float(), ones, 4)
        return matrix, Plain([ones[None]]), Plain([self._draw(1, self.d).float()])

    def inputs(self, tokens: int, sparsity: float) -> Tensor:
        """Return x `[tokens, d]`, correlated so far that active sets overlap as the benchmark wants."""
        own = torch.randn(tokens, self.d, device=self.device, generator=self.generator, dtype=torch.float32)
        shared = torch.randn(1, self.d, device=self.device, generator=self.generator, dtype=torch.float32)
        wanted = (self.benchmark.union or {}).get((tokens, sparsity))
        if tokens == 1 or wanted is None:
            return own.to(self.dtype)
        low, high, x = 0.0, 1.0, own.to(self.dtype)
        for _ in range(20):
            mix = (low + high) / 2
            x = (mix**0.5 * shared + (1 - mix) ** 0.5 * own).to(self.dtype)
            u = (x @ self.both[0][self.h :].t()).float().abs()
            active = u > u.quantile(sparsity, dim=1, keepdim=True)
            low, high = (mix, high) if float(active.any(dim=0).float().mean()) > wanted else (low, mix)
        return x

    def dense(self, tokens: int, *, compiled: bool) -> dict[str, Callable[[], None]]:
        """Return steps through the dense FFNs of all layers, by what computes them."""
        x = torch.randn(tokens, self.d, device=self.device, generator=self.generator, dtype=torch.float32)
        x = x.to(self.dtype)
        act, h = ACTIVATIONS[self.benchmark.activation], self.h

        def fused(both: Tensor, down: Tensor) -> Tensor:
            both = F.linear(x, both)
            return F.linear(act(both[:, :h]) * both[:, h:], down)

        def split(both: Tensor, down: Tensor) -> Tensor:
            return F.linear(act(F.linear(x, both[:h])) * F.linear(x, both[h:]), down)

        if self.device.type != "cuda":
            # Laid out as nn.Linear does, which is faster here.
            down = [weight.contiguous() for weight in self.down]
            variants = {"torch, gate and up fused": fused, "torch, gate and up split": split}
            return {name: self._through(ffn, down) for name, ffn in variants.items()}
        variants = {FUSED: fused, "cuBLAS": split}
        if compiled:
            variants["torch.compile max-autotune"] = torch.compile(
                fused, dynamic=False, mode="max-autotune-no-cudagraphs"
            )
        return {name: self._through(ffn, self.down) for name, ffn in variants.items()}

    def _through(self, ffn: Callable[[Tensor, Tensor], Tensor], downs: list[Tensor]) -> Callable[[], None]:
        def step() -> None:
            for both, down in zip(self.both, downs, strict=True):
                ffn(both, down)

        return step

    def _draw(self, rows: int, columns: int) -> Tensor:
        shape = (rows, columns)
        drawn = torch.randn(shape, device=self.device, dtype=self.dtype, generator=self.generator)
        return drawn.mul_(self.d**-0.5)


def _arguments(sum_: Gated, parts: Sequence[Weight] = ()) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return weights and biases of a call, and what says how they are stored."""
    stored = (*sum_.weights, *parts)
    options = {"kind": sum_.kind, "formats": [weight.format for weight in stored], "activation": sum_.activation}
    return ([part for weight in stored for part in weight.parts], list(sum_.biases)), options


class _Deciding:
    """A method that decides by one projection, which is not read again, or by a proxy."""

    def __init__(self, layers: _Layers, config: Method, sparsity: float, x: Tensor) -> None:
        self.layers, self.name, self.sparsity, self.x = layers, config.name, sparsity, x
        self.selector = config.selector
        self.compensation = None if config.compensation is None else type(config.compensation)
        self.compensate = self.compensation.name if self.compensation else ""
        self.indicator = self.selector.indicator
        self.second_look = getattr(config, "second_look", 0.0)
        self.how = {
            "selector": self.selector.name,
            "rule": "threshold",
            "drop": int(sparsity * layers.h),
            "compensation": self.compensate,
        }
        drops = replace(config, sparsity=sparsity).drops if sparsity < 1 else (sparsity,)
        self.counters = torch.zeros(1 + len(drops), dtype=torch.int64, device=x.device)
        self.parts = layers.parts(self.selector, self.compensate)
        self.own = len(self.selector.shapes(layers.d, layers.h))  # of these, the selector's come first
        own = sum(part.nbytes for part in self.parts[0]) / (layers.d * layers.h * x.element_size())
        self.decides, self.reused = len(self.selector.reads) + own, len(self.selector.reads)
        self.thresholds = [self._threshold(layer, drops[0]) for layer in range(layers.count)]
        if len(drops) > 1:
            self.thresholds = [self._with_second(layer, drops[1]) for layer in range(layers.count)]

    def _with_second(self, layer: int, sparsity: float) -> Tensor:
        """Return the thresholds of a layer with those of a second look that leaves so many neurons inactive."""
        first = self.thresholds[layer]
        sizes = size_of(self.layers.sum(layer).project(self.x))
        left = torch.where(self._value(layer).view_as(sizes) > first, sizes, -1.0).flatten()
        second = torch.full_like(first, -1.0) if sparsity == 0 else _in_a_gap(left, int(sparsity * len(left)))
        return torch.stack([first, second.expand_as(first)])

    def _threshold(self, layer: int, sparsity: float) -> Tensor:
        if sparsity in (0, 1):
            return torch.full(
                (self.layers.h,), -1.0 if sparsity == 0 else torch.inf, device=self.x.device, dtype=torch.float32
            )
        value = self._value(layer)
        distinct = value.unique()
        place = torch.searchsorted(distinct, value.kthvalue(max(1, int(sparsity * len(value)))).values)
        # Of three places between values that where the order in which a kernel sums decides least.
        few = distinct[max(0, int(place) - 1) : int(place) + 3]
        between = (few[1:] + few[:-1]) / 2 if len(few) > 1 else few
        undecided = torch.stack([self._undecided(layer, between, error) for error in SUMMING_ERRORS])
        threshold: Tensor = between[undecided.sum(dim=0).argmin()]
        return threshold.expand(self.layers.h).contiguous()

    def _undecided(self, layer: int, thresholds: Tensor, error: float) -> Tensor:
        """Return for each threshold how many neurons a relative error of what is rounded and compared may decide."""
        less, more = (self._value(layer, 1 + change)[:, None] > thresholds for change in (-error, error))
        return (less != more).sum(dim=0)

    def _value(self, layer: int, scale: float = 1.0) -> Tensor:
        """Return the indicator of all tokens' neurons `[tokens·h]`, what it is rounded from times `scale`."""
        sum_ = self.layers.sum(layer)
        if own := self.parts[layer][: self.own]:
            return (scale * self.selector.score(sum_, self.x, own, ())).flatten()
        role = sum_.roles.index(self.selector.reads[0])
        rounded = (scale * F.linear(self.x.float(), sum_.weights[role].values().float())).to(self.layers.dtype)
        activated = ACTIVATIONS[sum_.activation](rounded) if sum_.roles[role] == "gate" else rounded
        return activated.float().abs().flatten()

    def run(self, layer: int) -> Tensor:
        arguments, options = _arguments(self.layers.sum(layer), self.parts[layer])
        return torch.ops.countdown.sparse(  # type: ignore[no-any-return]
            self.x, *arguments, self.thresholds[layer], self.counters, None, **options, **self.how
        )

    def step(self) -> None:
        for layer in range(self.layers.count):
            self.run(layer)

    def active(self, layer: int, *, looks: int | None = None) -> Tensor:
        arguments, options = _arguments(self.layers.sum(layer), self.parts[layer])
        thresholds = self.thresholds[layer][0] if looks == 1 < len(self.counters) - 1 else self.thresholds[layer]
        return torch.ops.countdown.select(  # type: ignore[no-any-return]
            self.x, *arguments, thresholds, None, **options, **self.how
        )

    def unions(self) -> list[float]:
        """Return the share of neurons that some token needs after each look."""
        found = []
        for looks in range(1, len(self.counters)):
            every = range(self.layers.count)
            shares = [self.active(layer, looks=looks).any(dim=0).float().mean() for layer in every]
            found.append(float(torch.stack(shares).mean()))
        return found

    def realised(self) -> float:
        self.counters.zero_()
        self.step()
        tokens, *looks = (int(number) for number in self.counters)
        return 1 - sum(looks) / (len(looks) * tokens * self.layers.h)

    def error(self) -> float:
        return _error(self.layers, self.x, self.active(0), self.run(0), self._added())

    def _added(self) -> Tensor | float:
        """Return what the first layer predicts of dropped neurons."""
        if self.compensation is None:
            return 0.0
        dropped = torch.ones((len(self.x), self.layers.h), dtype=torch.bool, device=self.x.device)
        return self.compensation.added(self.x.float(), dropped, dropped[:, :1], self.parts[0][self.own :]).double()


def _in_a_gap(values: Tensor, below: int) -> Tensor:
    """Return a number that about so many values lie below, in the widest gap nearby: kernels sum in other orders."""
    ordered = values.sort().values[max(0, below - 4) : below + 5]
    low, high = ordered[:-1], ordered[1:]
    return ((low + high) / 2)[((high - low) / high.clamp(min=1e-30)).argmax()]


class _Given:
    """Active sets that are known, one for each layer and token."""

    name = indicator = GIVEN
    compensate, second_look = "", 0.0
    decides, reused = 0.0, 0

    def __init__(self, layers: _Layers, sparsity: float, x: Tensor) -> None:
        self.layers, self.sparsity, self.x = layers, sparsity, x
        keep = layers.h - int(sparsity * layers.h)
        deciding = _Deciding(layers, method(DEFAULT_METHOD), sparsity, x)
        order = [deciding.active(layer) for layer in range(layers.count)]
        self.sets = [self._exactly(mask, keep) for mask in order] if len(x) == 1 else order

    def _exactly(self, mask: Tensor, keep: int) -> Tensor:
        # Others of the same number: random places, so that no layer's set is another's.
        fresh = torch.zeros_like(mask)
        places = torch.randperm(self.layers.h, device=mask.device, generator=self.layers.generator, dtype=torch.int64)
        fresh[0, places[:keep]] = True
        return fresh

    def run(self, layer: int) -> Tensor:
        sum_ = self.layers.sum(layer)
        if len(self.x) > 1 or self.x.device.type == "cpu":
            arguments, options = _arguments(sum_)
            sets = self.sets[layer], None, None
            return torch.ops.countdown.given(self.x, *arguments, *sets, **options)  # type: ignore[no-any-return]
        from countdown.ops.triton.ffn import listed_ffn

        return listed_ffn(self.x, sum_, *self._lists()[layer])

    def _lists(self) -> list[tuple[Tensor, Tensor]]:
        if not hasattr(self, "_listed"):
            self._listed = []
            for mask in self.sets:
                found = mask[0].nonzero().flatten().int()
                listed = torch.zeros(self.layers.h, dtype=torch.int32, device=mask.device)
                listed[: len(found)] = found
                self._listed.append((listed, torch.tensor([len(found)], dtype=torch.int32, device=mask.device)))
        return self._listed

    def step(self) -> None:
        for layer in range(self.layers.count):
            self.run(layer)

    def unions(self) -> list[float]:
        return [float(torch.stack([mask.any(dim=0).float().mean() for mask in self.sets]).mean())]

    def realised(self) -> float:
        return 1 - float(torch.stack([mask.float().mean() for mask in self.sets]).mean())

    def error(self) -> float:
        return _error(self.layers, self.x, self.sets[0], self.run(0))


def _error(layers: _Layers, x: Tensor, active: Tensor, y: Tensor, added: Tensor | float = 0.0) -> float:
    gate, up, down = [weight.values().double() for weight in layers.sum(0).weights]
    x = x.double()
    a = ACTIVATIONS[layers.benchmark.activation](x @ gate.t())
    return relative_error(y, torch.where(active, a * (x @ up.t()), 0) @ down.t() + added)
