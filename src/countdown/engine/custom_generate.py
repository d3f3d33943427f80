"""The decode loop for scripts that call `model.generate`: `model.generate(..., custom_generate=countdown.decode_loop)`.

transformers prepares as ever, its own processors and criteria decide; only the logits come from the loop.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from countdown.decoding import DecodeLoop
from countdown.engine.engine import SHORTEST, TURNS
from countdown.errors import ConfigError, UnsupportedModelError
from countdown.loading import context_of
from countdown.modules import sparse_modules
from countdown.sequences import NAMES
from countdown.sparsify import say_once

# What `generate` hands on that the loop has no use for, or makes for itself.
_KNOWN = {
    "attention_mask", "cache", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "token_type_ids",
    "use_cache",
}  # fmt: skip


class _Kept:
    """The loop of a model, and what the model was when its step was traced."""

    def __init__(self, model: nn.Module, loop: DecodeLoop) -> None:
        self.loop, self._state = loop, _state(model)

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

    The step is traced at the first call, on a GPU for up to a minute, and kept with the model for further ones, until
    the model is changed (sparsified, restored, adapted, hooked). What the loop does not run (batches, other outputs
    than tokens, inputs besides text, models that it refuses) is generated as transformers does, and that is said.
    transformers hands no streamer to a method of others: `functools.partial(countdown.decode_loop, streamer=streamer)`
    does.

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
            except UnsupportedModelError as error:
                refusal = str(error)
        if loop is not None:
            return _written(loop, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        say_once(f"transformers generates, which is slower: {refusal}")
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )


def _refusal(model: Any, ids: Tensor, config: Any, synced: bool, given: dict[str, Any]) -> str | None:
    """Return why the loop does not do what is asked for, None if it does."""
    mask, cache = given.get("attention_mask"), next((c for c in map(given.get, NAMES) if c is not None), None)
    others = [name for name, value in given.items() if name not in _KNOWN and isinstance(value, Tensor)]
    if len(ids) != 1 or ids.shape[1] == 0:
        return f"the decode loop takes one sequence, and there are {len(ids)}."
    if isinstance(mask, Tensor) and not bool(mask.all()):
        return "the prompt is padded."
    if config.return_dict_in_generate or synced or config.prefill_chunk_size:
        return "the decode loop gives tokens alone (no return_dict_in_generate, prefill_chunk_size or synced_gpus)."
    if cache is not None and _holds_something(cache):
        return "the cache that was given holds something already."
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
    if kept is not None and kept.serves(model, total):
        kept.loop.restart(ids, new_tokens=new_tokens)
        return kept.loop
    vars(model).pop(_KEPT, None)
    room = max(SHORTEST, 1 << (total - 1).bit_length())
    room = max(total, min(room, context_of(model.config) or room))
    loop = DecodeLoop(model, ids, new_tokens=new_tokens, room=room)
    object.__setattr__(model, _KEPT, _Kept(model, loop))
    return loop


def _state(model: nn.Module) -> list[Any]:
    """Return what tells whether a step that was traced is still the model's.

    Its modules, what is put on them, and where its tensors are.
    """
    found: list[Any] = [weakref.ref(module) for module in model.modules()]
    found += [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), vars(module).get("forward"))
        for module in model.modules()
    ]
    found += [parameter.data_ptr() for parameter in model.parameters()]
    found += [tensor.data_ptr() for site in sparse_modules(model).values() for tensor in (site.per_term, site.counters)]
    return found


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
