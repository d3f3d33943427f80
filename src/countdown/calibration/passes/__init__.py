"""Passes over the calibration text. One file a pass; a method names those that it needs."""

from countdown.calibration.passes._base import PASSES, Assignment, Pass, Run, register

__all__ = ["PASSES", "Assignment", "Pass", "Run", "register"]
