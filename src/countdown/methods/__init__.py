"""Methods: which terms a token needs. One file a method; nothing outside this folder names one, but the search for α,
which is r-sparse's own.
"""

from countdown.methods._base import Method
from countdown.methods._looking import USUAL as SECOND_LOOK
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
# What is tried on the linears outside of FFNs, beside a method for these; and what is compared with both on one budget.
LINEAR_METHOD, COMBINED_RECIPE = "wina", "d-proxy+wina"

__all__ = [
    "COMBINED_RECIPE",
    "DEFAULT_METHOD",
    "LINEAR_METHOD",
    "METHODS",
    "SECOND_LOOK",
    "Method",
    "NamedRecipe",
    "method",
    "method_class",
    "method_names",
    "named",
    "parse_method",
    "register",
]
