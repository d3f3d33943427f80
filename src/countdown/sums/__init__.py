"""Sums: what a site adds up. One file a kind; ops compute them, sites say where in a model they are."""

from countdown.sums._base import SUMS, Sum, register

__all__ = ["SUMS", "Sum", "register"]
