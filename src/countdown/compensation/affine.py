"""What a token's dropped terms add, predicted linearly from the input of the site; ours.

Skipping leaves out r(x) = Σ_{i inactive} s_i w_i, much of which is linear in x: y = Σ_{i active} s_i w_i + L x + b.
L and b come from least squares over calibration tokens (`calibration.passes.affine`), for a few sparsities.

L is stored in 4 bits, its columns times the root mean square of what they are multiplied with: the entries of a group
share a scale, and inputs differ a hundredfold. A token is divided by these, and rounded to 8 bits as a proxy's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from countdown.artifacts import Artifact, Artifacts, at_least, increasing
from countdown.compensation._base import Compensation, register
from countdown.sums import Sum
from countdown.weights import Plain, Weight
from countdown.weights.symmetric import Symmetric4, Tiles4, quantise, token_steps

# The sparsities of the site that there is a fit for.
AT = Artifact("affine_at", ("fits",), increasing)
# L of each, in the form of `Symmetric4`, its columns times those of CHANNELS.
LEVELS = Artifact("affine_levels", ("fits", "outputs", "packed"), dtype="uint8")
SCALES = Artifact("affine_scales", ("fits", "outputs", "groups"), dtype="float16")
# Root mean squares of the entries of the input.
SMALLEST = 1e-9
CHANNELS = Artifact("affine_channels", ("inputs",), at_least(SMALLEST))
# b of each.
BIAS = Artifact("affine_bias", ("fits", "outputs"))


# Sparsities, and what share of the least squares is taken there, between them in proportion: text unlike the
# calibration's is predicted worse, and where little is dropped there is less to win than to spoil.
SHRINKAGE = (0.5, 0.7), (0.7, 1.0)


def shrinkage(sparsity: float) -> float:
    """Return what L and b of the least squares are multiplied with at a sparsity."""
    (low, least), (high, most) = SHRINKAGE
    return min(max(least + (sparsity - low) / (high - low) * (most - least), least), most)


@register
@dataclass(frozen=True)
class Affine(Compensation):
    """L x + b for every sparse token.

    Args:
        sparsity: The site's. The fit is that for the highest sparsity that is no higher: one for a higher sparsity adds
            too much, one for a lower one is nearly as good.
    """

    name = "affine"
    artifacts = (AT, LEVELS, SCALES, CHANNELS, BIAS)
    derived = False

    sparsity: float

    @staticmethod
    def shapes(d: int, terms: int) -> tuple[tuple[int, int], ...]:
        return (d, d), (1, d), (1, d)  # an FFN has as many outputs as inputs

    @staticmethod
    def problem(sum_: Sum, parts: Sequence[Weight]) -> str | None:
        if sum_.kind != "ffn":
            return "is of FFNs"
        d = sum_.weights[0].shape[1]
        if not isinstance(parts[0], Symmetric4 | Tiles4):
            return f"L is in format '{parts[0].format}', expected {Symmetric4.format} or {Tiles4.format}"
        expected, found = Affine.shapes(d, sum_.terms), tuple(part.shape for part in parts)
        if found != expected:
            return f"L, channels and b are {found}, expected {expected}"
        if any(part.parts[0].dtype != torch.float32 for part in parts[1:]):
            return "channels and b are not float32"
        return None if (problem := parts[0].problem()) is None else f"L {problem}"

    @staticmethod
    def added(x: Tensor, dropped: Tensor, sparse: Tensor, parts: Sequence[Weight]) -> Tensor:
        matrix, channels, bias = parts
        steps, size = token_steps(x.float() / channels.values()[0])
        y = matrix.product_of_steps(steps, size, bias.values()[0])
        return torch.where(sparse, y, 0).to(x.dtype)

    def make(self, sum_: Sum, artifacts: Artifacts) -> tuple[Weight, ...]:
        """Return L `[outputs, d]`, what its columns are times `[1, d]`, and b `[1, outputs]`."""
        place = self.taken(artifacts)
        assert place is not None
        d, outputs, device = sum_.weights[0].shape[1], sum_.outputs, sum_.weights[0].device
        # Copies, which do not hold on to the other fits.
        levels, scales, bias = (artifacts[one.name][place].to(device, copy=True) for one in (LEVELS, SCALES, BIAS))
        channels = artifacts[CHANNELS.name].to(device, copy=True)
        return Symmetric4([levels, scales], (outputs, d)), Plain([channels[None]]), Plain([bias[None]])

    def taken(self, artifacts: Artifacts) -> int | None:
        """Return the place of the fit that it takes, None where all are for higher sparsities."""
        below = int((artifacts[AT.name] <= self.sparsity + 1e-6).sum())
        return below - 1 if below else None

    def fitted(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Weight, ...]:
        return tuple(part.to(sum_.weights[0].device) for part in parts)

    def cut(self, sum_: Sum, parts: Sequence[Weight]) -> tuple[Weight, ...]:
        return tuple(parts)

    def part_bytes(self, sum_: Sum) -> int:
        return self.bytes_of(sum_.outputs, sum_.weights[0].shape[1])

    @staticmethod
    def bytes_of(outputs: int, d: int) -> int:
        """Return the bytes of L, of what its columns are times, and of b."""
        return Symmetric4.bytes_of(outputs, d) + 4 * (d + outputs)

    def bytes_read(self, sum_: Sum, active: float) -> float:
        """See `Compensation.bytes_read`; of a token that is dense nothing is read."""
        return self.part_bytes(sum_) if active < 1 else 0


def disagreement(artifacts: Artifacts) -> str | None:
    """Return how valid artifacts do not fit each other, None if they do."""
    at, levels, scales, channels, bias = (artifacts[one.name] for one in Affine.artifacts)
    expected = Symmetric4.part_shapes(bias.shape[1], len(channels))
    shapes = (levels.shape[1:], scales.shape[1:])
    if {len(at)} == {len(levels), len(scales), len(bias)} and shapes == expected:
        return None
    return "affine fits differ in number or size"


@torch.no_grad()
def fits(at: Sequence[float], inputs: Tensor, dropped: Sequence[Tensor], ridge: float) -> dict[str, Tensor]:
    """Return the artifacts of a site from sums over tokens, with x̃ = x and a 1.

    [L b] = C_rx (C_xx + λ diag(C_xx))⁻¹, b not penalised; all of it times `shrinkage`.

    Args:
        at: Sparsities, in ascending order.
        inputs: C_xx = Σ x̃ x̃ᵀ, `[d + 1, d + 1]`.
        dropped: C_rx = Σ r x̃ᵀ of each sparsity, `[outputs, d + 1]`.
        ridge: λ.
    """
    gram = inputs.double()
    squares = gram.diagonal()[:-1]
    tokens = gram[-1, -1]
    mean = float(squares.mean() / tokens) or 1.0
    # What the text leaves at 0 predicts next to nothing, whatever it is later on.
    channels = torch.where(squares > 0, squares / tokens, mean).clamp(min=1e-3 * mean).sqrt().clamp(min=SMALLEST)
    penalty = torch.cat([(ridge * squares).clamp(min=1e-6 * mean * float(tokens)), 1e-9 * tokens.view(1)])
    factor = torch.linalg.cholesky(gram + torch.diag(penalty))
    ones = torch.ones(len(channels), dtype=torch.float32, device=gram.device)
    levels, scales, biases = [], [], []
    for sparsity, sums in zip(at, dropped, strict=True):
        solved = torch.cholesky_solve(sums.double().T, factor).T * shrinkage(sparsity)
        matrix = quantise((solved[:, :-1] * channels).float(), ones, 4)
        levels.append(matrix.parts[0])
        scales.append(matrix.parts[1])
        biases.append(solved[:, -1].float())
    sparsities = torch.tensor(at, dtype=torch.float32, device="cpu")
    found = (sparsities, torch.stack(levels), torch.stack(scales), channels.float(), torch.stack(biases))
    return {one.name: tensor.cpu() for one, tensor in zip(Affine.artifacts, found, strict=True)}
