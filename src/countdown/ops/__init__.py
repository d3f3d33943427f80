"""The operations under a sparse FFN.

`indicators` names what decides, `schema` declares the ops, `reference` is their truth in plain PyTorch.
Importing this package loads none of them, so that naming a method does not load torch.
"""
