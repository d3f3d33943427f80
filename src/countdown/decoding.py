"""A decode loop whose cost is the model's: one step from token to next token, compiled, captured once and replayed.

Hugging Face's `generate` spends part of every token in Python. This loop keeps the cache and the token on the device,
attends by groups of heads, and computes the linears of a single token at the bandwidth limit. It takes any model that
runs with a static cache, dense or sparsified, for one sequence, greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from countdown.errors import ConfigError, UnsupportedModelError
from countdown.models.loading import check_context
from countdown.ops import backends  # noqa: F401  (registers the ops)

ATTENTION = "countdown_grouped"
WARM_UP = 4
DEVICES = ("cuda",)


class DecodeLoop:
    """Greedy decoding of one sequence on a CUDA device.

    Args:
        model: A causal language model of transformers on a CUDA device, in eval mode; left as it was.
        prompt: Token ids `[1, n]`.
        new_tokens: How many tokens `run` may make.

    Raises:
        ConfigError: Not on a CUDA device, several sequences, or more tokens than the model's context.
        UnsupportedModelError: The model does not compile as one graph.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, *, new_tokens: int) -> None:
        from transformers import StaticCache

        device = next(model.parameters()).device
        if device.type not in DEVICES:
            raise ConfigError(f"the decode loop captures CUDA graphs, and the model is on {device.type}.")
        if len(prompt) != 1:
            raise ConfigError(f"the decode loop takes one sequence, and the prompt has {len(prompt)}.")
        check_context(model, prompt.shape[1] + new_tokens)
        length = prompt.shape[1] + new_tokens + WARM_UP
        self.model, self.left = model, new_tokens
        # A whole number of blocks, for kernels that like them.
        self.cache = StaticCache(config=model.config, max_cache_len=-(-length // 128) * 128)
        if any(layer.is_sliding for layer in self.cache.layers):
            raise UnsupportedModelError(
                f"{type(model).__name__} has a sliding-window cache, which keeps its position in Python and cannot be "
                "captured; the decode loop takes models with full attention."
            )
        # Not inference_mode: the cache is written inside compiled code and outside of it.
        with torch.no_grad(), on_device(device):
            self.token = self._next(prompt.to(device))
            self._graph = self._capture()

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
                tokens[position] = self.token[0, 0]
                self._graph.replay()
        return tokens

    def _next(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        token: Tensor = logits[:, -1].argmax(dim=-1, keepdim=True)
        return token

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = [(layer, layer.cumulative_length.clone()) for layer in self.cache.layers]
        first = self.token.clone()

        def step() -> None:
            self.token.copy_(compiled(self.token))

        with _one_token(self.model):
            compiled = torch.compile(self._next, fullgraph=True, dynamic=False)
            try:
                graph = record(step)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} does not compile as one graph: {str(error).splitlines()[0]}"
                ) from error
        # What warming up wrote into the cache is written again by the first replays.
        self.token.copy_(first)
        for layer, length in before:
            layer.cumulative_length.copy_(length)
        return graph


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
def _one_token(model: Any) -> Iterator[None]:
    """Within the context, attend by groups of heads and project one token by `project_one`."""
    attention = model.config._attn_implementation
    linears = [module for module in model.modules() if _bare(module)]
    grouped = _register_attention() if attention == "sdpa" else attention
    try:
        if grouped != attention:
            model.set_attn_implementation(grouped)
        for linear in linears:
            linear.forward = _projection(linear)
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)
        if grouped != attention:
            model.set_attn_implementation(attention)


def _bare(module: nn.Module) -> bool:
    """Return whether a module is a linear with nothing put on it that would be bypassed."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked


def _projection(linear: nn.Linear) -> Any:
    def forward(x: Tensor) -> Tensor:
        if x.shape[:-1].numel() != 1:
            return F.linear(x, linear.weight, linear.bias)
        y: Tensor = torch.ops.countdown.project_one(x.reshape(1, -1), linear.weight, linear.bias)
        return y.view(*x.shape[:-1], -1)

    return forward


def _register_attention() -> str:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _grouped_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query attending to all keys, the heads that share a key taken as queries of it.

    query `[1, heads, 1, n]`, key and value `[1, groups, length, n]` → `[1, 1, heads, n]`.
    """
    batch, heads, _one, size = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups, size)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float() * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = torch.where(attention_mask[:, :, :, : key.shape[2]], scores, torch.finfo(torch.float32).min)
    out = torch.matmul(scores.softmax(dim=-1).to(query.dtype), value)
    return out.reshape(batch, heads, 1, size).transpose(1, 2).contiguous(), None
