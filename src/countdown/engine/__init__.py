"""Prefill and decode: answers token by token, greedy or sampled."""
