"""One budget of bytes read for all sites, spent where it hurts least."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from countdown.allocation._base import Allocation, Problem, register, together
from countdown.artifacts import ERRORS
from countdown.errors import ProfileError

if TYPE_CHECKING:
    from torch import Tensor

# No site is made sparser, unless the budget comes close: estimates say little about so few terms.
AT_MOST = 0.98
# Prices are sought from the dearest down by this factor, in so many bisections of the exponent.
_RANGE = 1e-60
_HALVINGS = 80


class GlobalBudget(Allocation):
    """Minimises the estimated rise of the model's KL; see `allocate`."""

    name = "global"
    kinds = ("ffn", "linear")
    artifacts = (ERRORS,)
    passes = ("errors",)
    across = True

    def allocate(self, problem: Problem) -> dict[str, float]:
        if problem.sparsity == 0:
            return dict.fromkeys(problem.sizes, 0.0)
        if any(ERRORS.name not in problem.artifacts[name] for name in problem.sizes):
            raise ProfileError("the profile was not calibrated for allocation 'global'; calibrate again with it.")
        import torch

        groups = together(problem.sizes, problem.artifacts)
        errors = [torch.stack([problem.artifacts[name][ERRORS.name] for name in group]).sum(dim=0) for group in groups]
        sizes = [sum(problem.sizes[name] for name in group) for group in groups]
        shares = allocate(
            torch.stack(errors), torch.tensor(sizes, dtype=torch.int64, device="cpu"), problem.sparsity
        ).tolist()
        return {name: share for group, share in zip(groups, shares, strict=True) for name in group}


def allocate(errors: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """Spend one budget of bytes read where it hurts least: `allocation="global"`.

    Minimises Σ_l errors_l(k_l) under Σ_l size_l·k_l = sparsity·Σ_l size_l. Solved by a price λ of sparsity: each site
    takes its own minimum of errors_l(k) − λ·size_l·k, and λ is bisected until the budget is met.

    Args:
        errors: Estimated error at sparsities 0, 1/n, ..., (n-1)/n, float `[sites, n]`, finite.
        sizes: What a unit of sparsity saves of each site, `[sites]`.
        sparsity: 0 ≤ sparsity < 1, over all sites.

    Returns:
        Sparsity of each site, float64 `[sites]`.
    """
    import torch

    at_most = max(AT_MOST, (1 + sparsity) / 2)
    n = errors.shape[1]
    errors = errors.double()
    share = sizes.double() / sizes.double().sum()
    grid = torch.arange(n, dtype=torch.float64, device="cpu") / n
    grid, errors = grid[grid <= at_most], errors[:, : int((grid <= at_most).sum())]

    def chosen(price: float) -> Tensor:
        return grid[(errors - price * share[:, None] * grid).argmin(dim=1)]

    def spent(price: float) -> float:
        return float((chosen(price) * share).sum())

    high = _dearest(errors, share, grid)
    low = high * _RANGE
    if spent(low) >= sparsity:
        # What costs nothing is enough.
        low, high = 0.0, low
    for _ in range(_HALVINGS if low else 0):
        # Of the exponent: prices differ by orders of magnitude where the scales of errors do.
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if spent(middle) < sparsity else (low, middle)
    # Between the two the budget is crossed, at once where an error curve is not convex: meet it in between.
    gap = spent(high) - spent(low)
    part = (sparsity - spent(low)) / gap if gap > 0 else 0.0
    return (chosen(low) + (chosen(high) - chosen(low)) * part).clamp(0, at_most)


def _dearest(errors: Tensor, share: Tensor, grid: Tensor) -> float:
    """Return a price at which every site takes all the sparsity there is."""
    if len(grid) < 2:
        return 1.0
    steepest = (errors.diff(dim=1) / grid.diff()).amax(dim=1) / share
    return float(2 * steepest.max().clamp(min=1e-300))


register(GlobalBudget())
