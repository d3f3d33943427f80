"""Sites: the modules of a decoder that sum terms, found by structure. One file a kind; nothing outside names one."""

from countdown.sites._base import SITES, Kind, Site, check_untouched, find_parts, find_sites, register

__all__ = ["SITES", "Kind", "Site", "check_untouched", "find_parts", "find_sites", "register"]
