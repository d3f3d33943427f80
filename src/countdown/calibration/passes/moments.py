"""Moments of the dense model's factors, and what follows from them: multipliers, and what a selector is made from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from countdown.artifacts import GROUP, MULTIPLIERS, NORMS, Moment
from countdown.calibration.passes._base import Assignment, Pass, Run, decoding, never_ran, register
from countdown.config import check_choice
from countdown.cost import beside_bytes
from countdown.memory import memory_for
from countdown.sites import Site
from countdown.sums import Sum

# By site: the means, float64 [terms], or [inputs] of the input.
Moments = Mapping[str, Mapping[Moment, Tensor]]
INPUT = "input"


class MomentsPass(Pass):
    """Runs the model dense, where any moment is asked for."""

    name, rank = "moments", 0

    def run(self, run: Run) -> None:
        wanting = run.wanting(self.name)
        moments = estimate(run, wanting) if self.readings(run) else {}
        with memory_for(sum(beside_bytes([one.site], one.method) for one in wanting)):
            groups = _groups(run, wanting)
            norms = _norms(wanting, groups)
            for one in wanting:
                _prepare(one, moments.get(one.site.name, {}), norms)

    def readings(self, run: Run) -> int:
        return int(any(one.method.moments() for one in run.wanting(self.name)))


def estimate(run: Run, assigned: list[Assignment]) -> Moments:
    """Return the moments, in the dense model, that each site's method asks for.

    Raises:
        ConfigError: A method asks for a factor that its sites do not have.
        CountdownError: An activation is not finite.
    """
    wanted = {one.site.name: one.method.moments() for one in assigned}
    for one in assigned:
        for moment in one.method.moments():
            known = dict.fromkeys((*one.site.sum_class.factors, INPUT))
            check_choice(f"factor of a moment of {one.method.name}", moment.factor, known)
    sums: dict[str, dict[Moment, Tensor]] = {name: {} for name in wanted}

    def observe(site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> None:
        seen = {INPUT: x, **dict(zip(sum_.factors, factors, strict=True))}
        for moment in wanted[site.name]:
            powers = seen[moment.factor].flatten(0, -2).double() ** moment.order
            sums[site.name][moment] = sums[site.name].get(moment, 0) + powers.sum(dim=0)

    with decoding(run.model, [one.site for one in assigned if wanted[one.site.name]], observe) as feed:
        for batch in run.track(run.batches(run.sequences), "second moments"):
            feed(batch)
    for name, found in sums.items():
        if len(found) < len(set(wanted[name])):
            raise never_ran(name)
    tokens = sum(sequence.numel() for sequence in run.sequences)
    return {site: {moment: (total / tokens).cpu() for moment, total in found.items()} for site, found in sums.items()}


@torch.no_grad()
def _norms(assigned: list[Assignment], groups: list[list[str]]) -> dict[str, Tensor]:
    """Return the norms of each weighted site's columns, float64 `[terms]`, by name; those of a group taken together."""
    weighted = [one.site for one in assigned if one.method.weighting != "none"]
    norms = {site.name: site.sum.weights[-1].column_norms().cpu() for site in weighted}
    together: dict[str, Tensor] = {}
    for group in groups:
        of_all = torch.stack([norms[name] for name in group]).square().sum(dim=0).sqrt()
        together |= dict.fromkeys(group, of_all)
    return norms | together


def _groups(run: Run, assigned: list[Assignment]) -> list[list[str]]:
    """Return the names of the sites that share norms by the input that they read first; number them in artifacts."""
    sharing = {one.site.name: one for one in assigned if one.method.shares_norms}
    groups: list[list[str]] = []
    free = set(sharing)
    for readers in same_inputs(run, [one.site for one in sharing.values()]) if sharing else ():
        if group := [name for name in readers if name in free]:
            groups.append(group)
            free -= set(group)
    for number, group in enumerate(groups):
        for name in group:
            sharing[name].artifacts[GROUP.name] = torch.tensor(float(number), dtype=torch.float32, device="cpu")
    return groups


def same_inputs(run: Run, sites: list[Site]) -> list[list[str]]:
    """Return the names of sites by the input that they read, as the model runs: those of q, k and v together, say."""
    readers: dict[int, dict[str, Tensor]] = {}

    def observe(site: Site, sum_: Sum, x: Tensor, factors: tuple[Tensor, ...]) -> None:
        # The input is held, so that no other takes its identity.
        readers.setdefault(id(x), {})[site.name] = x

    with decoding(run.model, sites, observe) as feed:
        feed(run.sequences[0][None, :2])
    return [list(names) for names in readers.values()]


@torch.no_grad()
def _prepare(one: Assignment, moments: Mapping[Moment, Tensor], norms: Mapping[str, Tensor]) -> None:
    """Add multipliers and the selector's artifacts, and make its parts."""
    method = one.method
    if method.weighting != "none":
        multipliers = method.multipliers(moments, norms[one.site.name])
        # Sparse modules compare in float32, so that is what is sketched and stored.
        one.artifacts |= {} if multipliers is None else {MULTIPLIERS.name: multipliers.float()}
        if NORMS in method.artifacts():
            one.artifacts[NORMS.name] = norms[one.site.name].float()
    one.artifacts |= method.selector.prepare(moments)
    one.make_parts()


register(MomentsPass())
