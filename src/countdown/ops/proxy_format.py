"""The size of proxies. This file needs no torch; `ops.proxy` does the work."""

GROUP = 64
BITS = (3, 4)


def bits_per_weight(bits: int) -> float:
    """Return the bits of a weight, its share of the scale included, for a row of whole groups."""
    return bits + 16 / GROUP
