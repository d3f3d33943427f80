"""The streaming passes over the calibration text.

The first runs the model dense and estimates second moments, from which the weights of an indicator follow. The
second runs it sparse and estimates thresholds: what a module sees, and so how many of its terms lie below a
threshold, depends on how sparse the modules before it are. Each pass keeps sums and counts only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from countdown.calibration.sketch import MagnitudeSketch
from countdown.errors import CountdownError, UnsupportedModelError
from countdown.methods import Method
from countdown.models.sites import GatedFFN, Site
from countdown.modules import Observer, coefficients_of, observed
from countdown.profile import POINTS
from countdown.progress import track

# By site, then by factor: the mean square of each term's, float64 [terms].
Moments = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Assignment:
    """A site, the method that is calibrated for it, and what its indicator is multiplied by.

    Args:
        site: The site.
        method: Its method; its sparsity is the target.
        weights: float32 `[terms]`, or None for 1.
        importance: Mean squares of the inputs, float32 `[d]`, for a method with a proxy.
        proxy: The proxy; see `ops.proxy`.
    """

    site: Site
    method: Method
    weights: Tensor | None = None
    importance: Tensor | None = None
    proxy: list[Tensor] | None = None


@dataclass
class SiteSketches:
    """What the sparse pass saw of one site: a sketch of its weighted indicator at each sparsity it ran at."""

    by_level: dict[float, MagnitudeSketch] = field(default_factory=dict)

    def thresholds(self) -> Tensor:
        """Return thresholds for sparsities 0, 0.001, ..., 0.999, float32 `[1000]`, the first -1."""
        return torch.cat([torch.tensor([-1.0]), self._curve(MagnitudeSketch.quantiles).float()])

    def errors(self, terms: int) -> Tensor:
        """Return the expected squared error of the output at those sparsities, float64 `[1000]`, the first 0.

        Args:
            terms: How many terms the site has.
        """

        def per_token(sketch: MagnitudeSketch, q: Tensor) -> Tensor:
            return sketch.lost(q) * terms / int(sketch.counts.sum())

        return torch.cat([torch.zeros(1, dtype=torch.float64), self._curve(per_token)])

    def _curve(self, value: Callable[[MagnitudeSketch, Tensor], Tensor]) -> Tensor:
        """Return a value at sparsities 0.001, ..., 0.999, from sketches made at some sparsities.

        Between two of those, it is between theirs; beyond them, the nearest one's counts.
        """
        levels = sorted(self.by_level)
        q = torch.arange(1, POINTS, dtype=torch.float64) / POINTS
        by_level = torch.stack([value(self.by_level[level], q) for level in levels])
        position = torch.tensor(levels, dtype=torch.float64)
        above = torch.searchsorted(position, q).clamp(max=len(levels) - 1)
        below = (above - 1).clamp(min=0)
        gap = position[above] - position[below]
        share = torch.where(gap > 0, (q - position[below]) / gap, 1.0).clamp(0, 1)
        points = torch.arange(POINTS - 1)
        # More sparsity never means less, whatever text the levels happened to see.
        return torch.lerp(by_level[below, points], by_level[above, points], share).cummax(0).values


def second_moments(
    model: nn.Module, assigned: Sequence[Assignment], sequences: Sequence[Tensor], *, progress: bool = True
) -> Moments:
    """Return the mean square, in the dense model, of the factors that each site's method asks for.

    Args:
        model: A dense causal language model in eval mode.
        assigned: Its sites and their methods.
        sequences: Token ids, each int64 `[length]`.
        progress: Show progress on stderr.

    Raises:
        CountdownError: An activation is not finite.
    """
    wanted = {entry.site.name: entry.method.moments() for entry in assigned}
    sums: Moments = {name: {} for name in wanted}

    def observe(site: Site, x: Tensor, factors: tuple[Tensor, ...]) -> None:
        check_finite(site, factors)
        seen = {"input": x, **dict(zip(site.factors, factors, strict=True))}
        for name, value in seen.items():
            if name in wanted[site.name]:
                squares = value.flatten(0, -2).double().square().sum(dim=0)
                sums[site.name][name] = sums[site.name].get(name, 0) + squares

    with decoding(model, [entry.site for entry in assigned if wanted[entry.site.name]], observe) as feed:
        for sequence in track(sequences, "calibrating, second moments", show=progress):
            feed(sequence)
    for name, by_factor in sums.items():
        if len(by_factor) < len(wanted[name]):
            raise _never_ran(name)
    tokens = sum(sequence.numel() for sequence in sequences)
    return {site: {name: (total / tokens).cpu() for name, total in by_name.items()} for site, by_name in sums.items()}


def sketch_sparse(
    model: nn.Module,
    assigned: Sequence[Assignment],
    sequences: Sequence[Tensor],
    schedule: Iterator[Mapping[str, float]],
    *,
    losses: bool = False,
    label: str = "thresholds",
    progress: bool = True,
) -> dict[str, SiteSketches]:
    """Sketch every site's weighted indicator while all sites are sparse.

    A site masks at the quantile of what it has seen so far at the sparsity it runs at, the present sequence
    included, so that its mean over the text converges while the text is read once.

    Args:
        model, assigned, sequences, progress: As for `second_moments`.
        schedule: For each sequence, the sparsity of every site by name.
        losses: Sketch as well what dropping a term costs, c²‖w‖² for coefficient c and column w.
        label: What is estimated, shown with the progress.

    Returns:
        Sketches by site.

    Raises:
        CountdownError: An activation is not finite.
    """
    passing = _SparsePass(assigned, losses)
    with decoding(model, [entry.site for entry in assigned], passing.observe) as feed:
        for sequence in track(sequences, f"calibrating, {label}", show=progress):
            passing.levels = next(schedule)
            feed(sequence)
    for name, sketches in passing.sketches.items():
        if not sketches.by_level:
            raise _never_ran(name)
    return passing.sketches


def _never_ran(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} computed nothing for the text, so it cannot be calibrated; leave it out.")


class _SparsePass:
    """Masks every site at its present level and sketches what it saw."""

    def __init__(self, assigned: Sequence[Assignment], losses: bool) -> None:
        self.sketches = {entry.site.name: SiteSketches() for entry in assigned}
        self.levels: Mapping[str, float] = {}
        self._indicators = {entry.site.name: WeightedIndicator(entry) for entry in assigned}
        self._norms = {e.site.name: e.site.column_norms().float() for e in assigned} if losses else {}

    def observe(self, site: Site, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor | None:
        check_finite(site, factors)
        value = self._indicators[site.name](x, factors)
        level = self.levels[site.name]
        sketch = self.sketches[site.name].by_level.setdefault(level, MagnitudeSketch(site.device))
        sketch.add(value, self._lost(site, factors))
        if level == 0:
            return None
        return value > sketch.quantiles(torch.tensor([level], device=site.device)).float()

    def _lost(self, site: Site, factors: tuple[Tensor, ...]) -> Tensor | None:
        if site.name not in self._norms:
            return None
        return (coefficients_of(factors).float() * self._norms[site.name]).square()


class WeightedIndicator:
    """The weighted indicator of one site.

    Args:
        assignment: The site with its method and weights.
    """

    def __init__(self, assignment: Assignment) -> None:
        weights = assignment.weights
        self._formula = assignment.method.indicator.formula
        if assignment.method.proxy_bits and assignment.proxy is None:
            raise ValueError(f"{assignment.method.name} decides by a proxy, and {assignment.site.name} has none")
        self._assignment = assignment
        self._weights = None if weights is None else weights.to(assignment.site.device)

    def __call__(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return it, float32 `[..., terms]`, for the site's input and factors."""
        site, proxy = self._assignment.site, self._assignment.proxy
        if proxy is not None and isinstance(site, GatedFFN):
            factors = site.project_by(proxy, x)
        value = self._formula(*(factor.float() for factor in factors))
        return value if self._weights is None else value * self._weights


@contextmanager
def decoding(model: nn.Module, sites: Sequence[Site], observe: Observer) -> Iterator[Callable[[Tensor], None]]:
    """Within the context, the function given runs the decoder on token ids `[length]`, and `observe` sees the sites.

    The head is left out: the vocabulary's logits cost more than a layer.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    device = next(model.parameters()).device

    def feed(sequence: Tensor) -> None:
        decoder(input_ids=sequence[None].to(device), use_cache=False)

    with torch.inference_mode(), observed(model, sites, observe):
        yield feed


def check_finite(site: Site, factors: tuple[Tensor, ...]) -> None:
    """Raise CountdownError unless every factor is finite."""
    # A sum is finite only if every term is; one read-back for each site and sequence.
    if not bool(torch.stack([factor.float().sum() for factor in factors]).sum().isfinite()):
        raise CountdownError(
            f"activations of {site.name} are not finite in {factors[0].dtype}; calibrate in a wider dtype "
            "(--dtype bfloat16)."
        )
