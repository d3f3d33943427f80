"""Sketches of weighted indicators while all sites are sparse.

What a module sees, and so how many of its terms lie below a threshold, depends on how sparse the modules before it are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from countdown.artifacts import POINTS
from countdown.calibration.looks import Looks
from countdown.calibration.passes._base import Assignment, Run, decoding, never_ran
from countdown.methods import Method
from countdown.sites import Site
from countdown.sums import Sum
from countdown.sums._base import product_of


@dataclass
class SiteSketches:
    """What the sparse pass saw of one site: what its looks compared, by the share that each left inactive."""

    by_level: dict[tuple[float, ...], Looks] = field(default_factory=dict)

    def thresholds(self) -> Tensor:
        """Return thresholds for sparsities 0, 0.001, ..., 0.999, float32 `[1000]`, the first -1; of two looks, those of
        the first for what it drops.
        """
        return _from_all(self._curve(Looks.first_thresholds, of=0).float())

    def second_thresholds(self, drops: Callable[[float], tuple[float, ...]]) -> Tensor:
        """Return the thresholds of a second look for these sparsities of both together; see `thresholds`.

        Args:
            drops: From a sparsity to what is inactive after each look.
        """

        def second(looks: Looks, q: Tensor) -> Tensor:
            return looks.second_thresholds(q.new_tensor([drops(sparsity) for sparsity in q.tolist()]))

        return _from_all(self._curve(second).float())

    def errors(self, terms: int) -> Tensor:
        """Return the expected squared error of the output at those sparsities, float64 `[1000]`, the first 0.

        Args:
            terms: How many terms the site has.
        """

        def per_token(looks: Looks, q: Tensor) -> Tensor:
            return looks.first.lost(q) * terms / int(looks.first.counts.sum())

        return torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), self._curve(per_token)])

    def _curve(self, value: Callable[[Looks, Tensor], Tensor], *, of: int | None = None) -> Tensor:
        """Return a value at sparsities 0.001, ..., 0.999, from sketches made at some sparsities.

        Between two of those, it is between theirs; beyond them, the nearest one's counts.

        Args:
            value: From a sketch and sparsities to values.
            of: The look whose sparsities these are. [all together]
        """
        levels = sorted(self.by_level)
        q = torch.arange(1, POINTS, dtype=torch.float64, device="cpu") / POINTS
        by_level = torch.stack([value(self.by_level[level], q) for level in levels])
        at = [sum(drops) / len(drops) if of is None else drops[of] for drops in levels]
        position = torch.tensor(at, dtype=torch.float64, device="cpu")
        above = torch.searchsorted(position, q).clamp(max=len(levels) - 1)
        below = (above - 1).clamp(min=0)
        gap = position[above] - position[below]
        share = torch.where(gap > 0, (q - position[below]) / gap, 1.0).clamp(0, 1)
        points = torch.arange(POINTS - 1, dtype=torch.int64, device="cpu")
        # More sparsity never means less, whatever text the levels happened to see.
        return torch.lerp(by_level[below, points], by_level[above, points], share).cummax(0).values


def _from_all(thresholds: Tensor) -> Tensor:
    """Return a curve of thresholds that begins where nothing is dropped."""
    return torch.cat([thresholds.new_tensor([-1.0]), thresholds])


def sketch_sparse(
    run: Run,
    sequences: Sequence[Tensor],
    schedule: Iterator[Mapping[str, float]],
    *,
    losses: bool = False,
    label: str = "thresholds",
) -> dict[str, SiteSketches]:
    """Sketch every site's weighted indicator while all sites are sparse.

    A site masks at the quantile of what it has seen so far at the sparsity it runs at, the present sequence
    included, so that its mean over the text converges while the text is read once.

    Args:
        run: Whose sites are sketched.
        sequences: Token ids, each int64 `[length]`.
        schedule: For each sequence, the sparsity of every site by name.
        losses: Sketch as well what dropping a term costs, c²‖w‖² for coefficient c and column w. Sites look at terms
            once then: a budget is divided as if none looked twice.
        label: What is estimated, shown with the progress.

    Returns:
        Sketches by site.

    Raises:
        CountdownError: An activation is not finite.
    """
    passing = _SparsePass(run.assigned, losses)
    with decoding(run.model, [one.site for one in run.assigned], passing.observe, passing.add) as feed:
        for batch in run.track(run.batches(sequences), label):
            passing.levels = [next(schedule) for _ in batch]
            feed(batch)
    for name, sketches in passing.sketches.items():
        if not sketches.by_level:
            raise never_ran(name)
    return passing.sketches


class _SparsePass:
    """Masks every site at the present levels and sketches what it saw, sequence by sequence of a batch.

    So a site has seen the same before a sequence as if each ran alone.
    """

    def __init__(self, assigned: Sequence[Assignment], losses: bool) -> None:
        self._losses = losses
        self.sketches = {one.site.name: SiteSketches() for one in assigned}
        self.levels: list[Mapping[str, float]] = []  # of each sequence
        self._assigned = {one.site.name: one for one in assigned}
        self._norms = {
            n: one.site.sum.weights[-1].column_norms().float() for n, one in self._assigned.items() if losses
        }

    def observe(self, site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor | None:
        one = self._assigned[site.name]
        value = one.indicator(sum_, x, factors)
        second = None if self._losses else one.second_indicator(factors)
        # Layers may have flattened sequences and tokens into one dimension.
        shown = [None if seen is None else seen.reshape(len(self.levels), -1, site.terms)
                 for seen in (value, second, self._lost(site, factors))]  # fmt: skip
        active = []
        for place, levels in enumerate(self.levels):
            drops = self._method(site, levels).drops
            by_level = self.sketches[site.name].by_level
            looks = by_level.setdefault(drops, Looks(len(drops), site.device))
            first, again, lost = (None if seen is None else seen[place] for seen in shown)
            assert first is not None
            looks.add(first, again, lost)
            active.append(looks.active(drops, first, again))
        return torch.stack(active).view(value.shape)

    def _method(self, site: Site, levels: Mapping[str, float]) -> Method:
        method = self._assigned[site.name].method.at(site.name, levels[site.name])
        return method.one_look if self._losses else method

    def add(self, site: Site, x: Tensor, dropped: Tensor) -> Tensor | None:
        """Return what a site's compensation adds; see `modules.Adder`."""
        one, by_sequence = self._assigned[site.name], (len(self.levels), -1, site.terms)
        rows = zip(self.levels, x.reshape(len(self.levels), -1, x.shape[-1]), dropped.reshape(by_sequence), strict=True)
        added = [one.added_at(levels[site.name], *of_sequence) for levels, *of_sequence in rows]
        some = [one for one in added if one is not None]
        if not some:
            return None
        # Of some sparsities nothing is predicted.
        return torch.stack([torch.zeros_like(some[0]) if one is None else one for one in added]).view(*x.shape[:-1], -1)

    def _lost(self, site: Site, factors: tuple[Tensor, ...]) -> Tensor | None:
        if site.name not in self._norms:
            return None
        return (product_of(factors).float() * self._norms[site.name]).square()
