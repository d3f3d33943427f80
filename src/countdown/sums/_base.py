"""The base of every sum of terms, Σ_i c_i w_i + bias with columns w_i, of which a token needs some."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from typing import ClassVar

from torch import Tensor

from countdown.registry import Registry, classes_of
from countdown.weights import Weight

Shape = tuple[int | None, int | None]


class Sum(ABC):
    """Weights and biases, and what they compute.

    Args:
        weights: One for each of `roles`; of the last the columns are summed.
        biases: One for each, or None.
        activation: A key of `sums.activations.ACTIVATIONS`, "" for a kind without one.
    """

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]  # of its weights
    factors: ClassVar[tuple[str, ...]]  # what a coefficient is the product of
    __slots__ = ("activation", "biases", "weights")

    def __init__(self, weights: Sequence[Weight], biases: Sequence[Tensor | None], activation: str = "") -> None:
        self.weights, self.biases, self.activation = tuple(weights), tuple(biases), activation

    @staticmethod
    @abstractmethod
    def shapes(d: int, terms: int) -> tuple[Shape, ...]:
        """Return rows and columns of each weight for inputs of size d; None where they do not follow."""

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the factors of every term, each `[..., terms]` in the dtype of x, for x `[..., d]`."""

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return Σ_i c_i w_i + bias `[..., outputs]` for coefficients `[..., terms]`."""
        return self.weights[-1].product(coefficients, self.biases[-1])

    @property
    def terms(self) -> int:
        """How many terms it sums."""
        return self.weights[-1].shape[1]

    @property
    def outputs(self) -> int:
        """Size of the result."""
        return self.weights[-1].shape[0]

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless weights and biases fit each other and x."""
        d = x.shape[-1]
        expected = self.shapes(self.weights[0].shape[1], self.terms)
        if d != expected[0][1]:
            name, first = f"W_{self.roles[0]}", tuple(self.weights[0].shape)
            raise ValueError(f"x is {tuple(x.shape)}, expected [..., {expected[0][1]}] to fit {name} {first}")
        for role, weight, shape in zip(self.roles, self.weights, expected, strict=True):
            if any(wanted not in (None, size) for wanted, size in zip(shape, weight.shape, strict=True)):
                raise ValueError(f"W_{role} is {tuple(weight.shape)}, expected {shape}")
            if problem := weight.problem():
                raise ValueError(f"W_{role} {problem}")
        if len(self.biases) != len(self.roles):
            raise ValueError(
                f"biases has {len(self.biases)} entries, expected {len(self.roles)}, each a tensor or None"
            )
        for role, weight, bias in zip(self.roles, self.weights, self.biases, strict=True):
            if bias is not None and bias.shape != (weight.shape[0],):
                raise ValueError(f"bias of {role} has the wrong shape, expected {(weight.shape[0],)}")

    def with_weights(self, weights: Sequence[Weight]) -> Sum:
        """Return the same sum with its first weights replaced by these."""
        return type(self)((*weights, *self.weights[len(weights) :]), self.biases, self.activation)


SUMS: Registry[type[Sum]] = Registry("kind of sum", "countdown.sums", name=attrgetter("kind"), check=classes_of(Sum))
register = SUMS.register


def product_of(factors: Sequence[Tensor]) -> Tensor:
    """Return the product of the factors: what each term's column is multiplied by."""
    first, *others = factors
    for other in others:
        first = first * other
    return first
