"""What sparsity does to text that a model writes, without a judge: how far greedy continuations part.

Each prompt is continued by the model run dense and run sparse. Then the dense model reads both continuations and says
how likely it finds them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from countdown.config import check_choice
from countdown.engine.engine import check_fits
from countdown.errors import ConfigError, TextError
from countdown.evaluation.evaluate import Sums, check_scored, check_sparse, overall, perplexity
from countdown.evaluation.generation import encode_prompt, first_difference, generate
from countdown.evaluation.intervals import Interval, mean_interval
from countdown.modules import APPLY_TO, running
from countdown.progress import track
from countdown.sparsify import reset_counters, status
from countdown.text import is_text, read_text

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Continuation:
    """A prompt continued dense and sparse.

    Args:
        prompt: The prompt.
        dense_text, text: What the model wrote, dense and sparse.
        dense_tokens, tokens: How many tokens these are.
        first_divergence: Index of the first new token in which the two differ, None if they do not.
        edit_distance: Levenshtein distance of the tokens, divided by the length of the longer: 0 for equal texts, 1
            for texts that share nothing.
        dense_perplexity, perplexity: Of the dense and of the sparse continuation, both under the dense model.
    """

    prompt: str
    dense_text: str
    text: str
    dense_tokens: int
    tokens: int
    first_divergence: int | None
    edit_distance: float
    dense_perplexity: float
    perplexity: float


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of several prompts, dense and sparse.

    Args:
        apply_to: `decode`: prompts dense. `all`: every token sparse.
        max_new_tokens: A continuation has at most so many tokens.
        identical: Share of prompts whose two continuations are the same.
        shared_tokens: Tokens before the first that differs: mean over prompts; all of them where none does.
        edit_distance: Mean over prompts.
        dense_perplexity, perplexity: Geometric mean over prompts.
        perplexity_ratio: perplexity / dense_perplexity: geometric mean over prompts, from these pairs.
        realised_sparsity, weights_read: Over the tokens computed sparsely, as in `evaluation.evaluate.Evaluation`.
        continuations: By prompt.
    """

    apply_to: str
    max_new_tokens: int
    identical: float
    shared_tokens: Interval
    edit_distance: Interval
    dense_perplexity: Interval
    perplexity: Interval
    perplexity_ratio: Interval
    realised_sparsity: float
    weights_read: float
    continuations: list[Continuation]

    def records(self) -> list[dict[str, Any]]:
        """Return flat records as results files hold them: one of the means, then one for each prompt."""
        means = {name: value for name, value in vars(self).items() if name != "continuations"}
        flat: dict[str, Any] = {"scope": "all prompts", "prompts": len(self.continuations)}
        for name, value in means.items():
            flat |= _flat(name, value) if isinstance(value, Interval) else {name: value}
        return [flat, *({"scope": "prompt", **asdict(one)} for one in self.continuations)]


def _flat(name: str, interval: Interval) -> dict[str, float | None]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def load_prompts(path: str | Path) -> list[str]:
    """Return the prompts in a file: one a line, or in a `.jsonl` file the "prompt" of each line's object.

    Raises:
        TextError: The file cannot be read, has no prompt, or a line that is not what it should be.
    """
    path = Path(os.path.expanduser(path))
    # Not splitlines: a string in JSON may hold U+2028 and other characters that it would part lines at.
    lines = read_text(path, "file of prompts").split("\n")
    kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not kept:
        raise TextError(f"file of prompts {path} has no prompt; put one on each line.")
    if path.suffix == ".jsonl":
        return [_prompt_of(path, number, line) for number, line in kept]
    return [line.strip() for _, line in kept]


def _prompt_of(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise TextError(f'{path}, line {number}: expected an object such as {{"prompt": "..."}}.') from error
    if not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt):
        raise TextError(f"{path}, line {number}: the prompt is {prompt!r}, expected text.")
    return prompt


def encode_prompts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, raw: bool = False
) -> list[Tensor]:
    """Return the tokens `[1, n]` of each prompt, see `encode_prompt`, all of which the model can continue.

    Raises:
        ConfigError: One is empty, or see `check_fits`.
    """
    encoded = [encode_prompt(tokenizer, prompt, raw=raw) for prompt in prompts]
    for place, ids in enumerate(encoded, start=1):
        try:
            check_fits(model, ids[0].tolist(), max_new_tokens)
        except ConfigError as error:
            raise ConfigError(f"prompt {place} of {len(encoded)}: {error}") from error
    return encoded


def compare_continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    apply_to: str = "decode",
    max_new_tokens: int = MAX_NEW_TOKENS,
    raw: bool = False,
    progress: bool = True,
) -> Continuations:
    """Continue prompts greedily, dense and sparse, and compare.

    Args:
        model: A sparsified model; left as it was.
        tokenizer: Its tokenizer.
        prompts: Texts; each in the tokenizer's chat template, where it has one.
        apply_to: `decode` or `all`; the model's own does not matter here.
        max_new_tokens: At most so many, 2 or more: under `decode` the first comes from the dense prompt.
        raw: No chat template.
        progress: Show progress on stderr.

    Raises:
        UnsupportedModelError: The model is not sparsified.
        ConfigError: No or an empty prompt, too few new tokens, or more tokens than the model's context.
        CountdownError: Some token was not computed sparsely in some layer, or logits are not finite.
    """
    check_choice("apply_to", apply_to, APPLY_TO)
    if max_new_tokens < 2:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 2: the first is the dense prompt's.")
    if not prompts:
        raise ConfigError("there are no prompts to continue.")
    encoded = encode_prompts(model, tokenizer, prompts, max_new_tokens=max_new_tokens, raw=raw)
    reset_counters(model)
    found, fed = [], 0
    for prompt, ids in track(list(zip(prompts, encoded, strict=True)), "continuing prompts", show=progress):
        with running(model, "dense"):
            dense = generate(model, tokenizer, ids, max_new_tokens=max_new_tokens)
        with running(model, apply_to):
            sparse = generate(model, tokenizer, ids, max_new_tokens=max_new_tokens)
        # The last token is not fed. A prompt of one token counts as generated, see `SparseModule`.
        fed += len(sparse.tokens) - 1 + (ids.numel() if apply_to == "all" or ids.numel() == 1 else 0)
        with running(model, "dense"):
            perplexities = [_perplexity(model, ids, run.tokens) for run in (dense, sparse)]
        distance = levenshtein(dense.tokens, sparse.tokens) / max(len(dense.tokens), len(sparse.tokens))
        parted = first_difference(dense.tokens, sparse.tokens)
        lengths = (len(dense.tokens), len(sparse.tokens))
        found.append(Continuation(prompt, dense.text, sparse.text, *lengths, parted, distance, *perplexities))
    sites = status(model)
    check_sparse(sites, fed)
    return _means(found, apply_to, max_new_tokens, *overall(sites))


def _means(
    found: list[Continuation], apply_to: str, max_new_tokens: int, realised: float, read: float
) -> Continuations:
    parted = [one.first_divergence for one in found]
    return Continuations(
        apply_to=apply_to,
        max_new_tokens=max_new_tokens,
        identical=parted.count(None) / len(found),
        shared_tokens=mean_interval([one.tokens if at is None else at for one, at in zip(found, parted, strict=True)]),
        edit_distance=mean_interval([one.edit_distance for one in found]),
        dense_perplexity=_geometric([one.dense_perplexity for one in found]),
        perplexity=_geometric([one.perplexity for one in found]),
        perplexity_ratio=_geometric([one.perplexity / one.dense_perplexity for one in found]),
        realised_sparsity=realised,
        weights_read=read,
        continuations=found,
    )


def _geometric(values: Sequence[float]) -> Interval:
    """Return the geometric mean and its interval, which a mean of perplexities would leave to the largest."""
    found = mean_interval([math.log(value) for value in values])
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return Interval(math.exp(found.mean), low, high)


@torch.inference_mode()
def _perplexity(model: nn.Module, prompt: Tensor, tokens: Sequence[int]) -> float:
    """Return the perplexity of new tokens after a prompt `[1, n]`, in one call, as the model now runs."""
    device = next(model.parameters()).device
    new = torch.tensor(tokens, device=device, dtype=torch.int64)
    ids = torch.cat([prompt[0].to(device), new])[None]
    # The logits that predict the new tokens: from the prompt's last to the last but one.
    logits = model(ids, use_cache=False, logits_to_keep=len(tokens) + 1).logits[0, :-1]
    nll = F.cross_entropy(logits.float(), new, reduction="sum").item()
    check_scored(model, Sums(nll=nll, dense_nll=nll, tokens=len(tokens)), "the model")
    return perplexity(nll, len(tokens))


def levenshtein(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the fewest insertions, deletions and replacements that turn one sequence of tokens into another."""
    before = list(range(len(other) + 1))
    for row, a in enumerate(one, start=1):
        now = [row]
        for column, b in enumerate(other, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (a != b)))
        before = now
    return before[-1]
