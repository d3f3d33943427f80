"""The base of every weight format, and the list of them.

Letters: a matrix W is [rows, columns] as `nn.Linear` has it, z = W x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.errors import ConfigError
from countdown.registry import Registry, classes_of


class Weight(ABC):
    """A matrix [rows, columns] in some format.

    A format sets `format` and `part_names`, and says what its parts hold: `values` and `problem`. The reference then
    computes with it; a backend takes the formats that it has kernels for.

    Args:
        parts: The tensors that hold it, one for each of `part_names`.
        shape: (rows, columns), for formats that pad.
    """

    format: ClassVar[str]
    part_names: ClassVar[tuple[str, ...]]
    __slots__ = ("parts", "shape")

    def __init__(self, parts: Sequence[Tensor], shape: tuple[int, int]) -> None:
        self.parts, self.shape = tuple(parts), shape

    @classmethod
    def of(cls, parts: Sequence[Tensor], shape: tuple[int | None, int | None]) -> Weight:
        """Return the weight that these parts hold.

        Args:
            parts: One for each of `part_names`.
            shape: Its rows and columns where the caller knows them, each else None.
        """
        rows, columns = shape
        return cls(parts, (len(parts[0]) if rows is None else rows, parts[0].shape[1] if columns is None else columns))

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles."""
        return type(self), (self.parts, self.shape)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, as a token reads them."""
        return sum(part.nbytes for part in self.parts)

    @abstractmethod
    def values(self) -> Tensor:
        """Return the matrix, float `[rows, columns]`."""

    @abstractmethod
    def problem(self) -> str | None:
        """Return why the parts are no matrix of this shape, None if they are."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + bias `[..., rows]` for x `[..., columns]`, summed in float32 and rounded to the dtype of x."""
        bias = None if bias is None else bias.float()
        product: Tensor = F.linear(x.float(), self.values().float(), bias).to(x.dtype)
        return product

    def product_of_steps(self, steps: Tensor, size: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return (steps · size) Wᵀ + bias, float32 `[..., rows]`.

        Args:
            steps, size: See `weights.symmetric.token_steps`.
            bias: `[rows]` or None.
        """
        return self.product(steps * size, bias)

    def some_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of these indices, float `[n, columns]`."""
        return self.values()[rows]

    def coarse(self, bits: int) -> Weight | None:
        """Return the copy in so many bits that the format has within itself, None where one must be made."""
        return None

    def in_rows(self) -> Weight:
        """Return it in the form in which it is made and stored."""
        return self

    def by_column(self) -> Weight:
        """Return the same matrix with the entries of each column side by side, as kernels gather columns.

        Raises:
            ConfigError: The format has no such form.
        """
        raise ConfigError(f"weights in format '{self.format}' cannot be laid out by column.")

    def lies_by(self, dim: int) -> bool:
        """Return whether the entries of each column (`dim` 0) or row (1) lie side by side, as kernels read them."""
        return False

    def sliced(self, dim: int, part: slice) -> Weight:
        """Return some of its rows (`dim` 0) or columns (1): of a fused projection, or a shard; a view where it can be.

        Raises:
            ConfigError: The format cannot be cut there.
        """
        raise ConfigError(f"weights in format '{self.format}' cannot be sliced.")

    def column_norms(self) -> Tensor:
        """Return ‖W[:, j]‖₂, float64 `[columns]`."""
        norms: Tensor = self.values().detach().double().norm(dim=0)
        return norms

    def to(self, device: torch.device) -> Weight:
        """Return it on a device."""
        return type(self)([part.to(device) for part in self.parts], self.shape)


FORMATS: Registry[type[Weight]] = Registry(
    "weight format", "countdown.weights", name=attrgetter("format"), check=classes_of(Weight)
)
register = FORMATS.register
