"""The decode loop for scripts that call `model.generate`: `model.generate(..., custom_generate=countdown.decode_loop)`.

transformers prepares as ever, its own processors and criteria decide; only the logits come from the loop.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from countdown.decoding import DecodeLoop
from countdown.engine.engine import TURNS, room_for
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import context_of
from countdown.sequences import NAMES
from countdown.sparsify import say_once

# What `generate` hands on that the loop has no use for, or makes for itself.
_KNOWN = {
    "attention_mask", "cache", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache",
}  # fmt: skip


class _Kept:
    """The loop of a model, and what the model was when its step was traced; copies and pickles are of nothing."""

    def __init__(self, model: nn.Module, loop: DecodeLoop) -> None:
        self.loop, self._state = loop, _state(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def serves(self, model: nn.Module, tokens: int) -> bool:
        """Whether the model is as it was, and so many tokens fit."""
        return tokens <= self.loop.room and self._state == _state(model)


# A loop keeps its model, so a model keeps its loop: neither outlives the other.
_KEPT = "_countdown_decode_loop"


@torch.no_grad()
def decode_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Generate in the decode loop, as a decoding method for transformers' `generate`; greedy or sampled.

    The step is traced at the first call and kept with the model for further ones, until the model is changed
    (sparsified, restored, adapted, hooked). What the loop does not run (batches, other outputs than tokens, inputs
    besides text, models that it refuses) is generated as transformers does, and that is said. transformers hands no
    streamer to a method of others: `functools.partial(countdown.decode_loop, streamer=streamer)` does.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs:
            What `generate` hands to a decoding method.

    Returns:
        Token ids `[1, n]`, prompt and answer.

    Raises:
        ConfigError: Neither greedy decoding nor sampling is asked for, but beam search, say.

    Example:
        model.generate(ids, max_new_tokens=64, custom_generate=countdown.decode_loop)
    """
    mode = generation_config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        raise ConfigError(f"the decode loop does no {mode.replace('_', ' ')}: leave out custom_generate.")
    with TURNS:
        refusal = _refusal(model, input_ids, generation_config, synced_gpus, model_kwargs)
        loop = None
        if refusal is None:
            try:
                loop = _loop(model, input_ids, generation_config.max_length - input_ids.shape[1])
            except (ConfigError, UnsupportedModelError) as error:
                refusal = str(error)
        if streamer is not None:
            streamer.put(input_ids.cpu())  # as `generate` does with one of its own
        if loop is not None:
            return _written(loop, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        say_once(f"transformers generates, which is slower: {refusal}")
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )


def _refusal(model: Any, ids: Tensor, config: Any, synced: bool, given: dict[str, Any]) -> str | None:
    """Return why the loop does not do what is asked for, None if it does."""
    mask, cache = given.get("attention_mask"), next((c for c in map(given.get, NAMES) if c is not None), None)
    positions = given.get("position_ids")
    own = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)[None]
    counted = positions is None or torch.equal(positions, own)
    others = [name for name, value in given.items() if name not in _KNOWN and value is not None]
    others += [] if counted else ["position_ids"]
    if len(ids) != 1 or ids.shape[1] == 0:
        return f"the decode loop takes one sequence, and there are {len(ids)}."
    if isinstance(mask, Tensor) and not bool(mask.all()):
        return "the prompt is padded."
    if config.return_dict_in_generate or synced or config.prefill_chunk_size:
        return "the decode loop gives tokens alone (no return_dict_in_generate, prefill_chunk_size or synced_gpus)."
    if cache is not None and (getattr(cache, "_is_user_defined", False) or _holds_something(cache)):
        return "a cache was given, and the decode loop has its own."
    if config.cache_implementation not in (None, "static", "dynamic"):
        return f"the decode loop has a static cache, and {config.cache_implementation} is asked for."
    if others:
        return f"the decode loop takes text alone, and there is {others[0]}."
    return None


def _holds_something(cache: Any) -> bool:
    try:
        return int(cache.get_seq_length()) > 0
    except Exception:  # caches of all kinds: what does not say so may hold something
        return True


def _loop(model: Any, ids: Tensor, new_tokens: int) -> DecodeLoop:
    """Return a loop behind the prompt, that of an earlier call if it serves."""
    total = ids.shape[1] + new_tokens
    kept: _Kept | None = vars(model).get(_KEPT)
    vars(model).pop(_KEPT, None)
    if kept is not None and kept.serves(model, total):
        with suppress(UnsupportedModelError):
            kept.loop.restart(ids, new_tokens=new_tokens)
            object.__setattr__(model, _KEPT, _Kept(model, kept.loop))
            return kept.loop
    room = room_for(total)
    room = max(total, min(room, context_of(model.config) or room))
    loop = DecodeLoop(model, ids, new_tokens=new_tokens, room=room)
    object.__setattr__(model, _KEPT, _Kept(model, loop))
    return loop


def _state(model: nn.Module) -> list[Any]:
    """Return what tells whether a step that was traced is still the model's.

    Its modules with their settings and what is put on them, its configurations, and its tensors: where they are and how
    often they were written to.
    """
    found: list[Any] = []
    configs: dict[int, Any] = {}
    for module in model.modules():
        own = vars(module)
        hooks = [tuple(own[name]) for name in own if name.endswith("_hooks") and isinstance(own[name], dict)]
        found += [weakref.ref(module), hooks, own.get("forward")]
        found += [(name, repr(value)) for name, value in own.items() if _is_plain(value)]
        # Counters are written to at each step.
        buffers = [tensor for name, tensor in own["_buffers"].items() if name != "counters"]
        tensors = (*own["_parameters"].values(), *buffers, *own.values())
        found += [_written_to(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
        if hasattr(own.get("config"), "to_dict"):
            configs[id(own["config"])] = own["config"]
    found += [(repr(one.to_dict()), getattr(one, "_attn_implementation", None)) for one in configs.values()]
    return found


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a value is a number, a text, or made of such."""
    if value is None or isinstance(value, bool | int | float | str):
        return True
    if depth and isinstance(value, dict):
        return all(_is_plain(one, depth - 1) for pair in value.items() for one in pair)
    return bool(depth) and isinstance(value, list | tuple) and all(_is_plain(one, depth - 1) for one in value)


def _written_to(tensor: Tensor) -> tuple[int, int]:
    # Tensors made under inference_mode do not count.
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _written(loop: DecodeLoop, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any) -> Tensor:
    while True:
        scores = processors(ids, loop.advance().to(torch.float32, copy=True))
        if config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)
        else:
            token = scores.argmax(-1, keepdim=True)
        loop.token.copy_(token)
        ids = torch.cat([ids, token], dim=1)
        if streamer is not None:
            streamer.put(token.flatten().cpu())
        if not loop.left or bool(criteria(ids, None).all()):
            break
    if streamer is not None:
        streamer.end()
    return ids
