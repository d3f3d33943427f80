"""Other people's programs that run sparsified models."""
