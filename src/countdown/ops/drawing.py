"""The op that draws a token: schema, checks, fake and reference.

`draw_one` draws from logits [1, n], floats, as `engine.sampling` does: divided by `temperature`, only the `top_k`
likeliest (0: all), of those only the fewest that together have `top_p` of their probability, of those only what has
`min_p` of the likeliest one's. As likely as the last that is taken is as good. It returns the token, int64 [1, 1], and
the largest logit, float32 [1]: NaN if there is one, and the token is one of those then.

Drawn by the largest of logit / temperature + Gumbel noise, which the token's place and `seed`, an int64, decide: no
sums of probabilities are searched, and the same seed draws the same token on every device, but for rounding. Arguments
that do not fit raise ValueError.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countdown.ops.dense import check_logits

SCHEMA = (
    "(Tensor logits, float temperature, int top_k, float top_p, float min_p, int seed) -> (Tensor token, Tensor most)"
)
_ROUNDS = 10
_MULTIPLIERS, _ADDED = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def check_draw(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueError unless there are logits of one token, and settings within their ranges."""
    check_logits(logits)
    if not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(
            f"temperature is {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}, expected above 0, 0 or more, "
            "above 0 to 1, 0 to 1"
        )


def draw_one(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return a token `[1, 1]` and the largest logit `[1]`."""
    check_draw(logits, temperature, top_k, top_p, min_p)
    values = logits[0].float()
    most = values.amax().view(1)
    scaled = (values - most) / temperature
    ordered, places = scaled.sort(descending=True, stable=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if 0 < top_k < len(ordered):
        kept &= ordered >= ordered[top_k - 1]
    probability = ordered.double().exp() * kept
    before = probability.cumsum(0) - probability
    if top_p < 1:
        reached = (before < top_p * probability.sum()) & kept
        kept &= ordered >= ordered[reached.sum().clamp(min=1) - 1]
    kept &= probability >= min_p
    noise = torch.from_numpy(gumbel(seed, len(ordered))).to(logits.device)
    drawn = (ordered + noise[places]).masked_fill(~kept, float("-inf")).argmax()
    token = torch.where(most.isnan(), values.isnan().int().argmax(), places[drawn])
    return token.view(1, 1), most


def _fake(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    check_draw(logits, temperature, top_k, top_p, min_p)
    return logits.new_empty((1, 1), dtype=torch.int64), logits.new_empty(1, dtype=torch.float32)


def gumbel(seed: int, count: int) -> NDArray[np.float32]:
    """Return Gumbel noise of a seed, `[count]`: -log of an exponential.

    From 32 random bits each, of which the smallest exponentials, which make the largest noise, have all.
    """
    v = ((random_bits(seed, count).astype(np.float64) + 0.5) / 2**32).astype(np.float32)
    # The last below 1: of that the noise would be infinite, as if the token were none of those that are left.
    return -np.log(-np.log1p(-np.minimum(v, np.float32(1 - 2**-24))))


def random_bits(seed: int, count: int) -> NDArray[np.uint32]:
    """Return 32 random bits for each place: Philox 4x32-10 (Salmon et al., SC 2011, "Parallel random numbers")."""
    words = [np.arange(count, dtype=np.uint64)] + [np.zeros(count, dtype=np.uint64) for _ in range(3)]
    keys = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    first, second = (np.uint64(one) for one in _MULTIPLIERS)
    for _ in range(_ROUNDS):
        one, other = words[0] * first, words[2] * second
        shifted = np.uint64(32)
        words = [
            (other >> shifted) ^ words[1] ^ np.uint64(keys[0]),
            other & _LOW,
            (one >> shifted) ^ words[3] ^ np.uint64(keys[1]),
            one & _LOW,
        ]
        keys = [(key + added) & 0xFFFFFFFF for key, added in zip(keys, _ADDED, strict=True)]
    return words[0].astype(np.uint32)


OPS = {"draw_one": (SCHEMA, _fake, draw_one)}
