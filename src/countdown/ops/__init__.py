"""The operations under a sparse module.

`call` describes a call, `reference` is its truth in plain PyTorch, `backends` registers the ops and says who computes.
Importing this package loads none of them, so that naming a method does not load torch.
"""
