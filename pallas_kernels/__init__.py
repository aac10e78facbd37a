"""Kernels, a folder an op: a naive reference, an XLA form for every machine, and TPU and GPU forms; imports jax only.

Stability: experimental.
"""
