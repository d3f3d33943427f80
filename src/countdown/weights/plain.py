"""Weights as they are: one tensor with any strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from countdown.weights._base import Weight, register


@register
class Plain(Weight):
    """One tensor [rows, columns], of float32, float16 or bfloat16 (the reference takes any float dtype)."""

    format = "plain"
    part_names = ("values",)
    __slots__ = ()

    def __init__(self, parts: Sequence[Tensor], shape: tuple[int, int] | None = None) -> None:
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns."""
        return tuple(self.parts[0].shape)  # type: ignore[return-value]

    @classmethod
    def of(cls, parts: Sequence[Tensor], shape: tuple[int | None, int | None]) -> Plain:
        return cls(parts)

    def values(self) -> Tensor:
        """The tensor itself."""
        return self.parts[0]

    def problem(self) -> str | None:
        return None if self.parts[0].is_floating_point() else f"is {self.parts[0].dtype}, expected floating point"

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Weight.product`; where x has the dtype of the weights, the bits of the dense linear."""
        if x.dtype != self.parts[0].dtype:
            return super().product(x, bias)
        return F.linear(x, self.parts[0], None if bias is None else bias.to(x.dtype))

    def by_column(self) -> Plain:
        """The transposed view of a contiguous matrix: as good for a dense product."""
        values = self.parts[0]
        return self if values.t().is_contiguous() else Plain([values.t().contiguous().t()])

    def lies_by(self, dim: int) -> bool:
        values = self.parts[0]
        return values.stride(dim) == 1 or values.shape[dim] <= 1

    def in_rows(self) -> Plain:
        """Contiguous, as `nn.Linear` has it."""
        values = self.parts[0]
        return self if values.is_contiguous() else Plain([values.contiguous()])

    def sliced(self, dim: int, part: slice) -> Plain:
        return Plain([self.parts[0][:, part] if dim else self.parts[0][part]])

    def some_rows(self, rows: Tensor) -> Tensor:
        return self.parts[0].detach()[rows]
