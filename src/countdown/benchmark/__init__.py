"""Speed: memory bandwidth, sparse FFNs against dense ones, whole decoding. Correctness is checked before time."""
