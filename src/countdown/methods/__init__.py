"""Methods: which terms a token needs. One file a method; nothing outside this folder names one."""

from countdown.methods._base import Method
from countdown.methods._registry import (
    METHODS,
    NamedRecipe,
    method,
    method_class,
    method_names,
    named,
    parse_method,
    register,
)

# What the command line calibrates unless told otherwise.
DEFAULT_METHOD = "m-countdown"

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "Method",
    "NamedRecipe",
    "method",
    "method_class",
    "method_names",
    "named",
    "parse_method",
    "register",
]
