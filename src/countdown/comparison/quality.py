"""What a configuration costs in quality, window by window, against the same windows run dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from countdown.comparison.bootstrap import loss_interval
from countdown.comparison.comparison import CURVE, Layer, Quality
from countdown.evaluation.diagnostics import SelectorQuality, diagnose
from countdown.evaluation.evaluate import Sums, check_scored, check_sparse, overall, perplexity
from countdown.modules import running, sparse_modules
from countdown.progress import track
from countdown.sparsify import SiteStatus, reset_counters, status

# Logits of the dense model that are kept between configurations, rather than computed again.
KEPT_BYTES = 1 << 30
# 512 tokens: enough for shares that are stable to a point or two.
DIAGNOSED_WINDOWS = 1


@dataclass
class DenseLogits:
    """Logits of a dense model on windows.

    Args:
        model: It may be sparse, and is run dense.
        windows: Token ids, int64 `[n, length]`.
    """

    model: nn.Module
    windows: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)

    def of(self, place: int) -> Tensor:
        """Return the logits of one window, `[length, vocabulary]`."""
        if place in self.kept:
            return self.kept[place]
        with running(self.model, "dense"):
            logits = _logits(self.model, self.windows[place])
        if (len(self.kept) + 1) * logits.nbytes <= KEPT_BYTES:
            self.kept[place] = logits
        return logits


@torch.inference_mode()
def score(model: nn.Module, dense: DenseLogits, *, label: str, progress: bool) -> list[Sums]:
    """Return what the predictions in each window sum up to, every token sparse where the model is.

    Raises:
        CountdownError: Logits are not finite, or find a window all but impossible.
    """
    found = []
    for place in track(range(len(dense.windows)), f"evaluating {label}", show=progress):
        window, reference = dense.windows[place], dense.of(place)
        with running(model, "all"):
            logits = _logits(model, window)
        sums = Sums()
        sums.add(reference[:-1], logits[:-1], window[1:].to(logits.device))
        check_scored(model, sums, label)
        found.append(sums)
    return found


def differences(scored: Sequence[Sums]) -> list[float]:
    """Return by window the mean negative log-likelihood less the dense model's."""
    return [(sums.nll - sums.dense_nll) / sums.tokens for sums in scored]


def loss_of(differences: Sequence[float]) -> float:
    """Return the rise of perplexity, as a share, that differences by window amount to."""
    return math.expm1(sum(differences) / len(differences))


def measure_quality(model: nn.Module, dense: DenseLogits, *, label: str, seed: int, progress: bool) -> Quality:
    """Return what a dense, sparsified or quantised model costs.

    Raises:
        CountdownError: Logits are not finite, or a token was not computed sparsely.
    """
    sparse = bool(sparse_modules(model))
    judged: list[SelectorQuality] = []
    if sparse:
        judged = diagnose(model, dense.windows[:DIAGNOSED_WINDOWS])
        reset_counters(model)
    scored = score(model, dense, label=label, progress=progress)
    sites = status(model) if sparse else []
    check_sparse(sites, dense.windows.numel())
    tokens = sum(sums.tokens for sums in scored)
    return Quality(
        tokens=tokens,
        perplexity=perplexity(sum(sums.nll for sums in scored), tokens),
        loss=loss_of(differences(scored)),
        loss_interval=loss_interval(differences(scored), seed=seed),
        kl=sum(sums.kl for sums in scored) / tokens,
        top1=sum(sums.agree for sums in scored) / tokens,
        realised_sparsity=overall(sites)[0] if sparse else None,
        layers=_layers(sites, judged),
        window_nll=[sums.nll / sums.tokens for sums in scored],
    )


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits: Tensor = model(window[None].to(device), use_cache=False).logits[0]
    return logits


def _layers(sites: Sequence[SiteStatus], judged: Sequence[SelectorQuality]) -> list[Layer]:
    by_name = {found.name: found for found in judged}
    return [_layer(site, by_name.get(site.name)) for site in sites]


def _layer(site: SiteStatus, found: SelectorQuality | None) -> Layer:
    layer = (site.name, site.target_sparsity, site.realised_sparsity or 0.0)
    if found is None:
        return Layer(*layer)
    return Layer(*layer, found.recall, found.precision, found.lost, _curve(found.activity))


def _curve(activity: Sequence[float]) -> list[float]:
    """Return `CURVE` points of the shares, sorted, largest first."""
    falling = torch.tensor(activity, dtype=torch.float32, device="cpu").sort(descending=True).values
    places = torch.linspace(0, len(falling) - 1, CURVE, dtype=torch.float32, device="cpu").round().long()
    return [round(share, 5) for share in falling[places].tolist()]
