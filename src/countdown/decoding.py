"""A decode loop whose cost is the model's: one step from token to next token, traced once and replayed.

Hugging Face's `generate` spends part of every token in Python. This loop keeps the cache and the token on the device,
and computes the linears and the attention of a single token in kernels of ours. It takes any model that runs with a
static cache, dense or sparsified, for one sequence, greedily. On a CUDA device the step is compiled and captured in a
graph; on a CPU its operations are recorded (`replay`), which takes a tenth of a second where compiling takes a minute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import cache_argument, check_context
from countdown.modules import sparse_modules
from countdown.ops import backends  # noqa: F401  (registers the ops)
from countdown.replay import recorded

ATTENTION = "countdown"
# Tokens that are computed before the first that counts: one to look at the linears, two to compile, one to capture.
WARM_UP = 4
# Linears of one launch.
MOST_TOGETHER = 3
TILE = 512
DEVICES = ("cuda", "cpu")


class DecodeLoop:
    """Greedy decoding of one sequence on a CUDA device or a CPU.

    Args:
        model: A causal language model of transformers on such a device, in eval mode; left as it was.
        prompt: Token ids `[1, n]`.
        new_tokens: How many tokens `run` may make.

    Raises:
        ConfigError: On another device, several sequences, or more tokens than the model's context.
        UnsupportedModelError: The model's step does not compile as one graph, or cannot be recorded; or autocast is on.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, *, new_tokens: int) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        device = next(model.parameters()).device
        if device.type not in DEVICES:
            raise ConfigError(f"the decode loop runs on {' and '.join(DEVICES)}, and the model is on {device.type}.")
        if len(prompt) != 1:
            raise ConfigError(f"the decode loop takes one sequence, and the prompt has {len(prompt)}.")
        if torch.is_autocast_enabled(device.type):
            # What it prepares once, caches and recorded steps, has the dtypes of tensors.
            raise UnsupportedModelError("the decode loop does not run under torch.autocast; load in the dtype wanted.")
        check_context(model, prompt.shape[1] + new_tokens)
        length = prompt.shape[1] + new_tokens + WARM_UP
        self.model, self.left = model, new_tokens
        # A whole number of blocks, for kernels that like them.
        length = -(-length // 128) * 128
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        # One that slides keeps its position in Python. All tokens are kept instead, and the mask hides old ones.
        layers = self.cache.layers
        self.cache.layers = [StaticLayer(max_cache_len=length) if layer.is_sliding else layer for layer in layers]
        self._first = True
        counters = [site.counters for site in sparse_modules(model).values()]
        # Not inference_mode: the cache is written inside compiled code and outside of it.
        with torch.no_grad(), on_device(device), undone(counters, only_if_it_fails=True):
            self.token = self._next(prompt.to(device))
            # What warming up writes into the cache is written again by the first replays.
            with undone([self.token, *counters, *(layer.cumulative_length for layer in self.cache.layers)]):
                self._replay = self._trace()

    @torch.no_grad()
    def run(self, steps: int) -> Tensor:
        """Return the next tokens, int64 `[steps]`, on the device, without waiting for them.

        Raises:
            ConfigError: More steps than `new_tokens` in all.
        """
        if steps > self.left:
            raise ConfigError(f"{steps} more tokens do not fit the cache, {self.left} are left.")
        self.left -= steps
        tokens = torch.empty(steps, dtype=torch.int64, device=self.token.device)
        with on_device(self.token.device):
            for position in range(steps):
                # The first came with the prompt.
                if not self._first:
                    self._replay()
                self._first = False
                tokens[position] = self.token[0, 0]
        return tokens

    def _next(self, ids: Tensor) -> Tensor:
        given = cache_argument(self.model, self.cache)
        logits = self.model(input_ids=ids, **given, use_cache=True, logits_to_keep=1).logits
        return argmax(logits[:, -1])

    def _trace(self) -> Callable[[], object]:
        def step() -> None:
            self.token.copy_(following(self.token))

        # What a step runs: linears, those that read one input together.
        self.linears = _siblings(self.model, self.token, self.cache)
        following: Callable[[Tensor], Tensor] = self._next
        with _one_token(self.model, self.linears):
            try:
                if not self.token.is_cuda:
                    return recorded(step)
                following = torch.compile(self._next, fullgraph=True, dynamic=False, options=compiler_options())
                return record(step).replay
            except torch._dynamo.exc.TorchDynamoException as error:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} does not compile as one graph: {str(error).splitlines()[0]}"
                ) from error


@contextmanager
def undone(tensors: Sequence[Tensor], *, only_if_it_fails: bool = False) -> Iterator[None]:
    """Give tensors their values back after the context."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    except Exception:
        only_if_it_fails = False
        raise
    finally:
        if not only_if_it_fails:
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)


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


def record(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return `step` as a graph, after two runs that compile it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # for what the step reads
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@contextmanager
def _one_token(model: Any, groups: list[list[nn.Linear]]) -> Iterator[None]:
    """Within the context, linears of one token, a group a launch, and its attention run in our kernels."""
    switched = model.config._attn_implementation == "sdpa"
    before = _attention_of(model.config)
    try:
        if switched:
            model.set_attn_implementation(_register_attention())
        for linears in groups:
            for linear, forward in zip(linears, _projections(linears), strict=True):
                vars(linear)["forward"] = forward
        yield
    finally:
        for linear in (linear for linears in groups for linear in linears):
            vars(linear).pop("forward", None)
        if switched:
            model.set_attn_implementation(before)


def _attention_of(config: Any) -> dict[str, str]:
    """Return what attends, by part of a model; "" is the whole."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    return {"": config._attn_implementation} | {name: part._attn_implementation for name, part in parts.items()}


def _siblings(model: Any, ids: Tensor, cache: Any) -> list[list[nn.Linear]]:
    """Return the linears that a step runs, those in a row that read the very same input together."""
    seen: list[tuple[nn.Linear, Tensor]] = []
    bare = [module for module in model.modules() if _bare(module)]

    def keep(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Some linears run over the whole cache, as those of latent attention.
        if args[0].numel() == linear.in_features:
            seen.append((linear, args[0]))  # type: ignore[arg-type]

    hooks = [linear.register_forward_pre_hook(keep) for linear in bare]
    try:
        model(input_ids=ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[nn.Linear]] = []
    for place, (linear, x) in enumerate(seen):
        same = place > 0 and x is seen[place - 1][1] and linear.weight.dtype == groups[-1][-1].weight.dtype
        if same and len(groups[-1]) < MOST_TOGETHER:
            groups[-1].append(linear)
        else:
            groups.append([linear])
    # One that runs twice in a step would overwrite what the other of its group waits for.
    runs = Counter(id(linear) for linear, _ in seen)
    return [group for group in groups if all(runs[id(linear)] == 1 for linear in group)]


def _bare(module: nn.Module) -> bool:
    """Return whether a module is a linear with nothing put on it that would be bypassed."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    # A weight of another class, as quantised ones are, computes in its own way.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not hooked


def _projections(linears: list[nn.Linear]) -> list[Callable[[Tensor], Tensor]]:
    """Return a forward for each of the linears: the first computes all, the others take what is theirs."""
    sizes = [linear.out_features for linear in linears]
    waiting: dict[int, Tensor] = {}

    def compute(x: Tensor) -> Tensor:
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        y: Tensor = torch.ops.countdown.project_one(x.reshape(1, -1), weights, biases)
        parts = y.view(*x.shape[:-1], -1).split(sizes, dim=-1)
        waiting.update(enumerate(parts[1:], start=1))
        first: Tensor = parts[0]
        return first

    return [compute, *(partial(_take, waiting, place) for place in range(1, len(linears)))]


def _take(waiting: dict[int, Tensor], place: int, x: Tensor) -> Tensor:
    return waiting.pop(place)


def _register_attention() -> str:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query attending to all keys; see `attend_one`."""
    if key.shape != value.shape:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)  # type: ignore[no-any-return]
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = torch.ops.countdown.attend_one(query, key, value, mask, scale)
    return out.transpose(1, 2), None


def argmax(logits: Tensor) -> Tensor:
    """Return the place of the largest logit `[1, 1]` of `[1, vocabulary]`, in two stages: one is slow on a GPU."""
    missing = -logits.shape[1] % TILE
    tiles = (F.pad(logits, (0, missing), value=float("-inf")) if missing else logits).view(-1, TILE)
    tile = tiles.amax(dim=-1).argmax(dim=0, keepdim=True)
    place: Tensor = tile * TILE + tiles.index_select(0, tile).argmax(dim=-1)
    return place.view(1, 1)
