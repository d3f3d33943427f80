"""countdown: faster LLM decoding by skipping the FFN neurons a token does not need.

    profile = countdown.calibrate(model, tokenizer, text, countdown.method("m-countdown", sparsity=0.7))
    countdown.sparsify_(model, profile)      # model.generate() works as before
    countdown.restore_(model)                # and is dense again, to the bit

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from countdown.calibration.calibrate import calibrate
    from countdown.calibration.evolution import SearchSettings
    from countdown.calibration.search import search_alpha
    from countdown.comparison.compare import compare
    from countdown.comparison.comparison import Comparison
    from countdown.engine.custom_generate import decode_loop
    from countdown.engine.engine import Engine, Request
    from countdown.engine.sampling import Sampling
    from countdown.errors import (
        AccidentError,
        ConfigError,
        CountdownError,
        ProfileError,
        ProfileWarning,
        TextError,
        UnsupportedModelError,
    )
    from countdown.evaluation.choice import choose
    from countdown.evaluation.evaluate import evaluate
    from countdown.loading import load_tokenizer
    from countdown.methods import method, method_names
    from countdown.phase import phases
    from countdown.profiles.profile import Profile
    from countdown.profiles.recipe import Recipe, RecipeEntry, recipe
    from countdown.sparsify import export, from_pretrained, reset_counters, restore_, sparsify_, status
    from countdown.text import load_text, windows

_HOMES = {
    "calibrate": "countdown.calibration.calibrate",
    "SearchSettings": "countdown.calibration.evolution",
    "search_alpha": "countdown.calibration.search",
    "compare": "countdown.comparison.compare",
    "Comparison": "countdown.comparison.comparison",
    "choose": "countdown.evaluation.choice",
    "decode_loop": "countdown.engine.custom_generate",
    "Engine": "countdown.engine.engine",
    "Request": "countdown.engine.engine",
    "Sampling": "countdown.engine.sampling",
    "load_text": "countdown.text",
    "load_tokenizer": "countdown.loading",
    "AccidentError": "countdown.errors",
    "ConfigError": "countdown.errors",
    "CountdownError": "countdown.errors",
    "ProfileError": "countdown.errors",
    "ProfileWarning": "countdown.errors",
    "TextError": "countdown.errors",
    "UnsupportedModelError": "countdown.errors",
    "evaluate": "countdown.evaluation.evaluate",
    "export": "countdown.sparsify",
    "from_pretrained": "countdown.sparsify",
    "method": "countdown.methods",
    "method_names": "countdown.methods",
    "phases": "countdown.phase",
    "Profile": "countdown.profiles.profile",
    "recipe": "countdown.profiles.recipe",
    "Recipe": "countdown.profiles.recipe",
    "RecipeEntry": "countdown.profiles.recipe",
    "reset_counters": "countdown.sparsify",
    "restore_": "countdown.sparsify",
    "sparsify_": "countdown.sparsify",
    "status": "countdown.sparsify",
    "windows": "countdown.text",
}

__all__ = [
    "AccidentError",
    "Comparison",
    "ConfigError",
    "CountdownError",
    "Engine",
    "Profile",
    "ProfileError",
    "ProfileWarning",
    "Recipe",
    "RecipeEntry",
    "Request",
    "Sampling",
    "SearchSettings",
    "TextError",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "choose",
    "compare",
    "decode_loop",
    "evaluate",
    "export",
    "from_pretrained",
    "load_text",
    "load_tokenizer",
    "method",
    "method_names",
    "phases",
    "recipe",
    "reset_counters",
    "restore_",
    "search_alpha",
    "sparsify_",
    "status",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'countdown' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
