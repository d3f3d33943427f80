"""Selectors: what decides which terms are active. One file a selector.

Importing this package loads no torch, so that naming a method does not.
"""

from countdown.selectors._base import SELECTORS, Selector, register
from countdown.selectors.factor import COEFFICIENT, GATE, INPUT, UP, Factor

__all__ = ["COEFFICIENT", "GATE", "INPUT", "SELECTORS", "UP", "Factor", "Selector", "register"]
