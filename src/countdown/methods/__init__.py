"""Methods: which neurons a token needs. One file a method; nothing outside this folder names one."""

from countdown.methods._base import Method
from countdown.methods._registry import method, method_class, method_names, parse_method, register

__all__ = ["Method", "method", "method_class", "method_names", "parse_method", "register"]
