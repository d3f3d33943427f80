"""Operations of a recorded step that belong together, put together: for a GPU, where each takes as long as a kernel.

A norm is eight operations of torch, a rotation five, and a layer has thirty. What is found among them becomes one op of
`ops.dense`: norms with the sum before them, gated activations with their projections, attention with the rotation of
what it reads and the cache that it writes; and counters are counted up together. All else is done as it was recorded.
"""
