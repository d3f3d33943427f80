"""Allocation: how one sparsity asked of a group of sites becomes a sparsity for each. One file an allocation."""

from countdown.allocation._base import ALLOCATIONS, Allocation, Problem, register, together

__all__ = ["ALLOCATIONS", "Allocation", "Problem", "register", "together"]
