"""The errors countdown raises: one base, messages made to be read by the person who sees them."""

from __future__ import annotations

# How the API is told to replace what is there; the command line says its own option instead.
OVERWRITE = "overwrite=True"


class CountdownError(Exception):
    """Base of every error that countdown raises on purpose. The command line prints it as one line."""


class ConfigError(CountdownError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class UnsupportedModelError(CountdownError):
    """The model, or the state it is in, cannot be sparsified."""


class ProfileError(CountdownError):
    """A profile cannot be read, written, or does not belong to the model."""


class TextError(CountdownError):
    """A text source is missing or too short."""


class AccidentError(CountdownError):
    """What was asked for is right, but a disk was full, memory ran out: it may succeed another time."""


class ProfileWarning(UserWarning):
    """A profile is used with weights other than those it was calibrated on."""


def told(error: BaseException) -> str:
    """Return in one line what an error says, with its type where a message alone says little."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = lines[0] if lines else ""
    for line in lines[1:]:
        if not text.endswith(":"):
            break
        text = f"{text} {line}"
    if text and isinstance(error, OSError | ValueError | RuntimeError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
