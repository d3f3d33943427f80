"""Which linears of a decoder layer to make sparser first, by what the layer's output loses."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from countdown.allocation import together
from countdown.artifacts import PATH, POINTS
from countdown.calibration.passes._base import Pass, Run, decoding, never_ran, register
from countdown.calibration.sketch import MagnitudeSketch
from countdown.sites import Site
from countdown.sites.decoder import stacks
from countdown.sums import Sum

# A linear's sparsity rises by 1/STEPS at a time, on so many windows of text.
STEPS = 10
WINDOWS = 1


class GreedyPass(Pass):
    """Greedy allocation over the linears of each decoder layer (TEAL, arXiv 2408.14690, Algorithm 1).

    From a dense layer on, the sparsity of one linear rises by a step at a time: of that whose step adds the least
    squared error of the layer's output for each weight that it saves. What this leaves is the whole path: the sparsity
    of each linear at every sparsity of the layer, weighted by the sizes that the linears have, grouped keys and values
    theirs. Linears that share active sets step together.

    The layer's input is that of the dense model, and the layer is run for each look at a step; within it, every linear
    masks at the quantile of what it then sees, of either sign and around any mean. A look is kept until its linear
    comes first by it, for errors grow faster and faster, so that what was dear stays so. That makes about 2·n·STEPS
    runs of a layer where n linears step apart, 120 for seven: together the time of about 240 dense windows, half of it
    for counting magnitudes. With `wina`, whose linears step in four groups, SmolLM2-135M takes 2 minutes on two CPU
    cores. Activations are held of one layer at a time.
    """

    name, rank = "greedy", 1

    def run(self, run: Run) -> None:
        sites = {one.site.name: one for one in run.wanting(self.name)}
        if not sites:
            return
        search = _Search(run, _blocks(run))
        length = max(len(sequence) for sequence in run.shuffled)
        longest = [sequence for sequence in run.shuffled if len(sequence) == length]
        with decoding(run.model, [one.site for one in sites.values()], search.observe) as feed, search.watching():
            feed(torch.stack(longest[:: math.ceil(len(longest) / WINDOWS)]))
        for name, one in sites.items():
            if name not in search.paths:
                raise never_ran(name)
            one.artifacts[PATH.name] = search.paths[name]


@dataclass
class _Block:
    """A decoder layer and what steps in it.

    Args:
        layer: The module.
        entries: For each entry of the recipe that has some, names of linears, in lists of those that step together.
    """

    layer: nn.Module
    entries: list[list[list[str]]]


def _blocks(run: Run) -> list[_Block]:
    """Return the decoder layers that have linears to search."""
    entries = [entry.sites for entry in run.entries if GreedyPass.name in entry.method.passes()]
    found = []
    for path, layer in (entry for stack in stacks(run.model) for entry in stack):
        inside = [[name for name in sites if name.startswith(f"{path}.")] for sites in entries]
        groups = [together(names, sites) for names, sites in zip(inside, entries, strict=True) if names]
        if groups:
            found.append(_Block(layer, groups))
    return found


class _Search:
    """Searches each layer when the dense model runs it, from within a hook: its input is at hand then, and no other's.

    Args:
        run: The calibration.
        blocks: What to search.
    """

    def __init__(self, run: Run, blocks: Sequence[_Block]) -> None:
        self.paths: dict[str, Tensor] = {}
        self._assigned = {one.site.name: one for one in run.assigned}
        self._sizes = run.sizes
        self._blocks = blocks
        self._progress = run.track(blocks, "greedy allocation by layer")
        self._levels: Mapping[str, float] | None = None  # of sites that are sparse now; None outside of a search

    def observe(self, site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor | None:
        level = 0.0 if self._levels is None else self._levels.get(site.name, 0.0)
        if not level:
            return None
        value = self._assigned[site.name].indicator(sum_, x, factors)
        sketch = MagnitudeSketch(value.device)
        sketch.add(value)
        return value > sketch.quantile(level).float()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, a search follows the first run of each layer."""
        with ExitStack() as hooks:
            for block in self._blocks:
                handle = block.layer.register_forward_hook(self._hook(block), with_kwargs=True)
                hooks.callback(handle.remove)
            yield
            # To its end, so that it says so.
            for _ in self._progress:
                pass

    def _hook(self, block: _Block) -> Callable[..., None]:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if self._levels is not None or block.entries[0][0][0] in self.paths:
                return
            next(self._progress, None)
            dense = _hidden(output).float()

            def error(levels: Mapping[str, float]) -> float:
                self._levels = levels
                try:
                    return float(
                        (_hidden(layer(*arguments, **named)).float() - dense).square().sum(dtype=torch.float64)
                    )
                finally:
                    self._levels = None

            for groups in block.entries:
                self._add(groups, error)

        return hook

    def _add(self, groups: Sequence[Sequence[str]], error: Callable[[Mapping[str, float]], float]) -> None:
        """Search with these groups and add their paths."""

        def of_groups(levels: Sequence[float]) -> float:
            return error({name: level for group, level in zip(groups, levels, strict=True) for name in group})

        sizes = [sum(self._sizes[name] for name in group) for group in groups]
        for group, path in zip(groups, paths(sizes, climb(sizes, of_groups, STEPS)), strict=True):
            self.paths |= {name: path.clone() for name in group}


def _hidden(output: Any) -> Tensor:
    """Return the hidden states among what a decoder layer returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def climb(sizes: Sequence[float], error: Callable[[Sequence[float]], float], steps: int) -> list[list[float]]:
    """Return the sparsities on a greedy path from dense to all but the last step.

    Of all members, that one steps next whose step adds the least error for its size. How much it would add is looked at
    again only when it comes first by what was seen before (lazy evaluation, Minoux 1978): where errors are convex, this
    is the path that looking at every member before every step would find.

    Args:
        sizes: What a unit of sparsity saves, of each member.
        error: From the sparsity of each to the error that they make together.
        steps: A member steps by 1/steps.

    Returns:
        Sparsities of each member, one list for each point of the path, the first all 0.
    """
    taken = [0] * len(sizes)
    path, now = [[0.0] * len(sizes)], 0.0
    # Rate, member, and at which point of the path it was seen: dense members come first, to be looked at.
    waiting = [(-math.inf, member, -1, 0.0) for member in range(len(sizes))] if steps > 1 else []
    while waiting:
        rate, member, seen, found = heapq.heappop(waiting)
        raised = [(count + (place == member)) / steps for place, count in enumerate(taken)]
        # The last one has none to be compared with.
        if waiting and seen != len(path):
            found = error(raised)
            heapq.heappush(waiting, ((found - now) / sizes[member], member, len(path), found))
            continue
        taken[member] += 1
        path.append(raised)
        now = found
        if taken[member] < steps - 1:
            heapq.heappush(waiting, (rate, member, -1, 0.0))
    return path


def paths(sizes: Sequence[float], climbed: Sequence[Sequence[float]]) -> list[Tensor]:
    """Return each member's sparsity at sparsities 0, 0.001, ..., 0.999 of all, float32 `[1000]`.

    Args:
        sizes: As for `climb`.
        climbed: Points of a path that `climb` returned; the last step leads from its end to 1 for all.
    """
    knots = torch.tensor([*climbed, [1.0] * len(sizes)], dtype=torch.float64, device="cpu")
    share = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    reached = knots @ (share / share.sum())
    wanted = torch.arange(POINTS, dtype=torch.float64, device="cpu") / POINTS
    above = torch.searchsorted(reached, wanted).clamp(1, len(reached) - 1)
    part = (wanted - reached[above - 1]) / (reached[above] - reached[above - 1])
    found = torch.lerp(knots[above - 1], knots[above], part[:, None]).clamp(min=0).cummax(dim=0).values
    return list(found.float().T.contiguous())


register(GreedyPass())
