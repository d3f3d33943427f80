"""Perplexity, KL divergence and agreement of a sparsified model with itself run dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import DynamicCache

from countdown.config import check_choice
from countdown.errors import ConfigError, CountdownError, TextError, UnsupportedModelError
from countdown.finite import not_finite
from countdown.loading import cache_argument, check_context, check_known
from countdown.memory import batches, logits_at_once
from countdown.modules import running, sparse_modules
from countdown.phase import GENERATED, PROMPT, phases
from countdown.progress import track
from countdown.sparsify import SiteStatus, reset_counters, status
from countdown.text import unpadded

PROTOCOLS = ("all", "decode")
# Of a mean negative log-likelihood: beyond, exp overflows.
MOST_NATS = 700.0
# Windows that leave one token to score: one predicts the next; under decode half of them are prompt.
_SHORTEST = {"all": 2, "decode": 3}


@dataclass(frozen=True)
class LayerSparsity:
    """Target and realised sparsity of one module."""

    name: str
    target: float
    realised: float


@dataclass(frozen=True)
class Evaluation:
    """What sparsity costs on a text.

    Args:
        protocol: `all`: whole windows in one call, every token sparse. `decode`: the first half of each window
            is a dense prompt, the second goes through the cache one token at a time. Under either, `prompt_tokens` of
            a window are dense where that is given, and only what the others predict is scored.
        tokens: Scored tokens.
        perplexity, dense_perplexity: exp of the mean negative log-likelihood, sparse and dense.
        kl: Mean KL(dense ‖ sparse) of the next-token distributions, in nats.
        top1: Share of scored tokens for which both put the same token first.
        realised_sparsity: Share of inactive terms, over all replaced modules, each by its weights.
        weights_read: Share of the dense weight bytes of the replaced modules that is read at that sparsity, the
            selector's own included.
        layers: Sparsity by module.
    """

    protocol: str
    tokens: int
    perplexity: float
    dense_perplexity: float
    kl: float
    top1: float
    realised_sparsity: float
    weights_read: float
    layers: list[LayerSparsity] = field(repr=False)
    prompt_tokens: int | None = None

    def record(self) -> dict[str, Any]:
        """Return the fields flat, as results files hold them; of the layers, their realised sparsities."""
        flat = asdict(self)
        flat["apply_to"] = flat.pop("protocol")
        del flat["layers"]
        if self.prompt_tokens is None:
            del flat["prompt_tokens"]
        return flat | {"realised_sparsity_by_layer": [round(layer.realised, 5) for layer in self.layers]}


@dataclass
class Sums:
    """What scored positions sum up to.

    Args:
        nll, dense_nll: Negative log-likelihoods of the tokens that followed, in nats.
        kl: KL(dense ‖ sparse), in nats.
        agree: Positions at which both put the same token first.
        tokens: Positions.
    """

    nll: float = 0.0
    dense_nll: float = 0.0
    kl: float = 0.0
    agree: int = 0
    tokens: int = 0

    def add(self, dense: Tensor, sparse: Tensor, targets: Tensor) -> None:
        """Add scored positions: logits `[n, vocabulary]` and the tokens that followed, `[n]`."""
        step = logits_at_once(dense)
        parts = zip(dense.split(step), sparse.split(step), targets.split(step), strict=True)
        # Read back once: each time, a GPU would wait.
        nll, dense_nll, kl, agree = torch.stack([_scores(*part) for part in parts]).sum(dim=0).tolist()
        self.nll += nll
        self.dense_nll += dense_nll
        self.kl += kl
        self.agree += int(agree)
        self.tokens += len(targets)


def _scores(dense: Tensor, sparse: Tensor, targets: Tensor) -> Tensor:
    """Return what these positions add to the first four of `Sums`, float64 `[4]`."""
    log_p, log_q = F.log_softmax(dense.float(), dim=-1), F.log_softmax(sparse.float(), dim=-1)
    found = (
        F.nll_loss(log_q, targets, reduction="sum"),
        F.nll_loss(log_p, targets, reduction="sum"),
        F.kl_div(log_q, log_p, reduction="sum", log_target=True),
        (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
    )
    return torch.stack([one.double() for one in found])


def evaluate(
    model: nn.Module,
    windows: Tensor | Mapping[str, Any],
    *,
    protocol: str = "all",
    prompt_tokens: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare a sparsified model with itself run dense, on windows of text.

    Args:
        model: A sparsified model; its `apply_to` does not matter here and is left as it was.
        windows: Token ids, int64 `[n, length]`, from `countdown.windows`. Or a padded batch as tokenizers
            return it, `input_ids` and `attention_mask`: each sequence is run without its padding.
        protocol: `all` or `decode`; see `Evaluation`.
        prompt_tokens: So many tokens at the beginning of each window are a prompt: dense, and not scored. Methods that
            choose from the prompt need it under `all`. [none; under `decode` half of the window]
        progress: Show progress on stderr.

    Raises:
        UnsupportedModelError: The model is not sparsified, or does not decode with a plain cache.
        ConfigError: Unknown protocol, windows too short or longer than the model's context, tokens that it does not
            know, or a method that chooses from the prompt where there is none.
        TextError: What is given as windows is none.
        CountdownError: Some scored token was not computed sparsely in some layer, or logits are not finite.

    Example:
        ids = countdown.windows(tokenizer, countdown.load_text("python-docs", "evaluation"), count=2)
        found = countdown.evaluate(model, ids)
        print(found.perplexity, found.dense_perplexity, found.realised_sparsity)
    """
    check_choice("protocol", protocol, PROTOCOLS)
    reset_counters(model)
    if not isinstance(windows, Tensor | Mapping):
        raise TextError(
            f"windows are of type {type(windows).__name__}, expected token ids: countdown.windows(tokenizer, text)."
        )
    sequences = unpadded({"input_ids": windows} if isinstance(windows, Tensor) else windows)
    lengths = [len(sequence) for sequence in sequences]
    if min(lengths) < _SHORTEST[protocol]:
        raise ConfigError(
            f"windows have {min(lengths)} tokens, protocol '{protocol}' needs at least {_SHORTEST[protocol]}."
        )
    check_prompt(prompt_tokens, min(lengths))
    check_context(model, max(lengths))
    check_known(model, sequences)
    device = next(model.parameters()).device
    score = _scorer(protocol, prompt_tokens)
    sums, sparse_tokens = Sums(), 0
    with torch.inference_mode():
        for batch in track(_batches(model, sequences, protocol), f"evaluating ({protocol})", show=progress):
            sparse_tokens += score(model, batch.to(device), sums)
    check_scored(model, sums, "the sparse model")
    return replace(_result(model, protocol, sums, sparse_tokens), prompt_tokens=prompt_tokens)


def check_prompt(prompt_tokens: int | None, length: int) -> None:
    """Raise ConfigError unless so many tokens can be the prompt of a window of this length."""
    if prompt_tokens is not None and not 1 <= prompt_tokens <= length - 2:
        raise ConfigError(
            f"prompt_tokens is {prompt_tokens}, expected 1 to {length - 2}: a window has {length} tokens, of which one "
            "at least predicts and one is predicted."
        )


def _scorer(protocol: str, prompt_tokens: int | None) -> Callable[[nn.Module, Tensor, Sums], int]:
    """Return what scores windows `[n, length]`, and returns how many tokens were fed sparsely."""
    if protocol == "decode":
        return partial(_score_decode, prompt_tokens=prompt_tokens)
    return _score_all if prompt_tokens is None else partial(_score_after, prompt_tokens=prompt_tokens)


def _batches(model: nn.Module, sequences: Sequence[Tensor], protocol: str) -> list[Tensor]:
    """Return the sequences as they run, int64 `[sequences, length]`."""
    if protocol == "decode":  # as a model decodes one sequence, with the kernels for that
        return [sequence[None] for sequence in sequences]
    weight = next(model.parameters())
    vocabulary: int = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    terms = max(module.terms for module in sparse_modules(model).values())
    # Dense and sparse.
    return batches(sequences, weight.device, terms=terms, logits=2 * vocabulary * weight.element_size())


def _score_all(model: nn.Module, batch: Tensor, sums: Sums) -> int:
    """Score every next-token prediction within windows `[n, length]`; return how many tokens were fed sparsely."""
    with running(model, "dense"):
        dense = model(batch, use_cache=False).logits
    with running(model, "all"):
        sparse = model(batch, use_cache=False).logits
    for p, q, window in zip(dense, sparse, batch, strict=True):
        sums.add(p[:-1], q[:-1], window[1:])
    return batch.numel()


def _score_after(model: nn.Module, batch: Tensor, sums: Sums, *, prompt_tokens: int) -> int:
    """Score the predictions made from what comes after the prompts of windows `[n, length]`, in one call.

    A set that a prompt chooses depends on its tokens alone, which are dense: so this is what decoding gives.
    """
    now = torch.full(batch.shape, GENERATED, dtype=torch.uint8, device=batch.device)
    now[:, :prompt_tokens] = PROMPT
    with running(model, "dense"):
        dense = model(batch, use_cache=False).logits
    with running(model, "decode"), phases(model, now.flatten()):
        sparse = model(batch, use_cache=False).logits
    for p, q, window in zip(dense, sparse, batch, strict=True):
        sums.add(p[prompt_tokens:-1], q[prompt_tokens:-1], window[prompt_tokens + 1 :])
    return (batch.shape[1] - prompt_tokens) * len(batch)


def _score_decode(model: nn.Module, window: Tensor, sums: Sums, *, prompt_tokens: int | None) -> int:
    """Score the predictions made from what comes after a window's prompt, its first half, one token at a time."""
    half = prompt_tokens or window.shape[1] // 2
    steps = zip(_decode(model, window, half, "dense"), _decode(model, window, half, "decode"), strict=True)
    fed = 0
    for position, (dense, sparse) in enumerate(steps, start=half):
        sums.add(dense, sparse, window[:, position + 1])
        fed += 1
    return fed


def _decode(model: nn.Module, window: Tensor, half: int, mode: str) -> Iterator[Tensor]:
    """Yield logits `[1, vocabulary]` after each token behind the prompt, of so many as `half` says, but the last."""
    given = cache_argument(model, DynamicCache(config=model.config))
    with running(model, mode), phases(model, "prompt"):
        try:
            model(window[:, :half], **given, use_cache=True, logits_to_keep=1)
        except (AttributeError, TypeError, ValueError) as error:  # what models raise that keep something else
            raise UnsupportedModelError(
                f"{type(model).__name__} does not decode with the cache that transformers gives most models, which "
                f"protocol 'decode' needs: {type(error).__name__}: {error}"
            ) from error
    for position in range(half, window.shape[1] - 1):
        with running(model, mode):
            out = model(window[:, position : position + 1], **given, use_cache=True)
        yield out.logits[:, -1]


def perplexity(nll: float, tokens: int) -> float:
    """Return exp of the mean negative log-likelihood, which `check_scored` has seen."""
    return math.exp(nll / tokens)


def check_scored(model: nn.Module, sums: Sums, who: str) -> None:
    """Raise CountdownError unless quality can be told of what was scored.

    Args:
        model: What computed it.
        sums: Of a whole text or a part of it.
        who: What the model is called where it is not run dense.
    """
    for name, nll in (("the dense model", sums.dense_nll), (who, sums.nll)):
        if not math.isfinite(nll):
            raise not_finite(f"the logits of {name} are", model)
        if nll / sums.tokens > MOST_NATS:
            raise CountdownError(
                f"the perplexity of {name} is beyond what a number holds, e^{nll / sums.tokens:.0f}: it finds the text "
                "all but impossible."
            )
    if not math.isfinite(sums.kl):
        raise not_finite(f"the logits of the dense model or of {who} are", model)


def check_sparse(sites: Sequence[SiteStatus], tokens: int) -> None:
    """Raise CountdownError unless every sparse module has counted so many tokens."""
    for site in sites:
        if site.tokens != tokens:
            raise CountdownError(
                f"{site.name} computed {site.tokens} tokens sparsely, expected {tokens}: the numbers would "
                "mix dense and sparse. This is a defect in countdown or in a replaced forward; please report it."
            )


def overall(sites: Sequence[SiteStatus]) -> tuple[float, float]:
    """Return realised sparsity and weights read over all sparse modules, each by its weights."""
    whole = sum(site.size for site in sites)
    realised = sum((site.realised_sparsity or 0.0) * site.size for site in sites) / whole
    read = sum((site.weights_read or 0.0) * site.size for site in sites) / whole
    return realised, read


def _result(model: nn.Module, protocol: str, sums: Sums, sparse_tokens: int) -> Evaluation:
    sites = status(model)
    check_sparse(sites, sparse_tokens)
    realised, read = overall(sites)
    return Evaluation(
        protocol=protocol,
        tokens=sums.tokens,
        perplexity=perplexity(sums.nll, sums.tokens),
        dense_perplexity=perplexity(sums.dense_nll, sums.tokens),
        kl=sums.kl / sums.tokens,
        top1=sums.agree / sums.tokens,
        realised_sparsity=realised,
        weights_read=read,
        layers=[LayerSparsity(site.name, site.target_sparsity, site.realised_sparsity or 0.0) for site in sites],
    )
