"""Cosines and sines of rotations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from countdown.fusing.graph import Found, Graph
from countdown.replay import Done, tensors_in


def angles(graph: Graph, last: Done) -> Iterator[Found]:
    """Cosines and sines of a position times frequencies, whichever is made last."""
    ours = _waves(graph, last)
    if ours is None:
        return
    for one in graph.done[: graph.place[id(last)]]:
        others = _waves(graph, one)
        if others is None or others.kind == ours.kind or others.of is not ours.of or others.scale != ours.scale:
            continue
        cos, sin = (one, last) if others.kind == "aten::cos" else (last, one)
        parts = tuple(dict.fromkeys((last, one, *ours.parts, *others.parts)))
        # Of which only the dtype is read: one of a former step will do.
        like = last.made.new_empty(0)
        args = (ours.position, ours.frequencies, ours.scale, like)
        yield Found(torch.ops.countdown.angles_one.default, args, (cos.made, sin.made), parts, (cos, sin))


@dataclass(frozen=True)
class _Waves:
    """Cosines, or sines, of the same angles twice: of a position times frequencies."""

    kind: str
    of: Tensor
    position: Tensor
    frequencies: Tensor
    scale: float
    parts: tuple[Done, ...]


def _waves(graph: Graph, last: Done) -> _Waves | None:
    cast = last if last.name == "aten::_to_copy" else None
    scaled = graph.maker(last.args[0], "aten::mul") if cast else last if last.name == "aten::mul" else None
    wave = scaled and graph.maker(scaled.args[0], "aten::cos", "aten::sin")
    twice = wave and graph.maker(wave.args[0], "aten::cat")
    if not (scaled and wave and twice) or not isinstance(scaled.args[1], float):
        return None
    if not cast and {reader.name for reader in graph.readers(last.made)} == {"aten::_to_copy"}:
        return None  # its rounding belongs to it
    parts = twice.args[0]
    product = graph.maker(graph.origin(parts[0]), "aten::mul", "aten::bmm")
    if len(parts) != 2 or parts[0] is not parts[1] or product is None or len(tensors_in(product.args)) != 2:
        return None
    for factors in (product.args, product.args[::-1]):
        frequencies, position = (graph.origin(factor) for factor in factors)
        number = graph.maker(position, "aten::_to_copy")
        if number is None or not graph.stays(frequencies) or not _is_list(frequencies, parts[0]):
            continue
        whole = number.args[0].dtype == torch.int64 and number.made.dtype == torch.float32
        if whole and number.args[0].numel() == 1:
            own = (last, scaled, wave, twice, product, number)
            return _Waves(wave.name, wave.args[0], number.args[0], frequencies.view(-1), scaled.args[1], own)
    return None


def _is_list(frequencies: Tensor, angles: Tensor) -> bool:
    return frequencies.dtype == torch.float32 and frequencies.numel() == angles.numel() and frequencies.is_contiguous()
