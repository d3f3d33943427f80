"""Methods: which neurons a token needs. One file a method; nothing outside this folder names one."""

from countdown.methods._base import Method
from countdown.methods._registry import method, method_class, method_names, parse_method, register

# What the command line calibrates unless told otherwise.
DEFAULT_METHOD = "m-countdown"

__all__ = ["DEFAULT_METHOD", "Method", "method", "method_class", "method_names", "parse_method", "register"]
