"""Weights: how a matrix is stored. One file a format; nothing outside this folder knows how one is packed."""

from countdown.weights._base import FORMATS, Weight, register
from countdown.weights.plain import Plain

__all__ = ["FORMATS", "Plain", "Weight", "register"]
