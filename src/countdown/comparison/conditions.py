"""How a comparison was measured, in words."""

from __future__ import annotations

from typing import Any

from countdown.comparison.comparison import Comparison
from countdown.comparison.formats import count


def measured(comparison: Comparison, *, quality: bool = False, speed: bool = False) -> str:
    """Return how quality, speed or both were measured, as a sentence."""
    meta = comparison.meta
    parts = [quality_measured(comparison)] if quality else []
    parts += [speed_measured(meta)] if speed else []
    return f"Measured: {'; '.join([*parts, machine(meta)])}."


def quality_measured(comparison: Comparison) -> str:
    """Return what quality was measured on."""
    meta = comparison.meta
    tokens = max((cell.quality.tokens for cell in comparison.cells if cell.quality), default=0)
    text = meta.get("text", "a text")
    name = text.get("source", "a text") if isinstance(text, dict) else text
    windows = f" in {meta['windows']} windows" if "windows" in meta else ""
    length = f" of {meta['window_tokens']}" if windows and "window_tokens" in meta else ""
    return f"{count(tokens, 'scored token')} of {name}{windows}{length}"


def speed_measured(meta: dict[str, Any]) -> str:
    """Return what speed was measured of."""
    context = f" after {meta['context']} tokens" if "context" in meta else ""
    new = f", {meta['new_tokens']} new ones" if "new_tokens" in meta else ""
    return f"one sequence decoded{context}{new}, in one session with dense"


def machine(meta: dict[str, Any]) -> str:
    """Return the dtype, and what computed."""
    hardware = meta.get("hardware", {})
    gpu = hardware.get("gpu") if str(meta.get("device", "")).startswith("cuda") else None
    processor = [hardware.get("cpu"), f"{hardware['threads']} threads" if "threads" in hardware else None]
    said = [meta.get("dtype"), *([gpu] if gpu else processor)]
    return ", ".join(str(one) for one in said if one) or "on a machine that is not named"


def calibrated(meta: dict[str, Any]) -> str:
    """Return what methods were calibrated on."""
    found = meta.get("calibration")
    if not isinstance(found, dict):
        return ""
    tokens = f"{count(found['tokens'], 'token')} of " if "tokens" in found else ""
    return f"calibrated on {tokens}{found.get('source', 'a text')}"


def computed_by(meta: dict[str, Any]) -> str:
    """Return the versions of what computed."""
    found = meta.get("identity", {}).get("versions") or meta.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in found.items())
