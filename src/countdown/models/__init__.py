"""Models: finding their gated FFNs by structure, loading them, telling them apart."""
