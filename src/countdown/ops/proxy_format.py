"""The size of proxies. This file needs no torch; `ops.proxy` does the work."""

GROUP = 64
BITS = (3, 4)
# What a level is packed as: fields of so many of its bits, the lowest first.
FIELDS = {4: (4,), 3: (2, 1)}


def bits_per_weight(bits: int) -> float:
    """Return the bits of a weight, its share of the scale included, for a row of whole groups."""
    return bits + 16 / GROUP


def group_of(d: int, bits: int) -> int:
    """Return the size of a group in rows of d weights: of 64, 32, 16 and 8 the one that takes the fewest bytes."""
    if d % GROUP == 0:  # at every call of every FFN
        return GROUP
    return min((64, 32, 16, 8), key=lambda size: -(-d // size) * (size * bits + 16))


def padded(d: int, bits: int) -> int:
    """Return d rounded up to whole groups."""
    size = group_of(d, bits)
    return -(-d // size) * size


def proxy_bytes(h: int, d: int, bits: int) -> int:
    """Return the bytes of the proxies of gate and up, each `[h, d]`."""
    width = padded(d, bits)
    return 2 * h * (bits * width // 8 + 2 * (width // group_of(d, bits)))
