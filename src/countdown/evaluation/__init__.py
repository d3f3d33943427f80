"""Evaluation: what sparsity costs in quality, with every scored token computed sparsely."""
