"""Compensation: what a sparse site adds for the terms that it drops. One file a compensation.

Importing this package loads no torch, so that naming a method does not.
"""

from countdown.compensation._base import COMPENSATIONS, Compensation, register
from countdown.compensation._budget import kept, rank

__all__ = ["COMPENSATIONS", "Compensation", "kept", "rank", "register"]
