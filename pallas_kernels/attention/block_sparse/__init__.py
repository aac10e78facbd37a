"""Attention over a list of key blocks for each block of queries: what is not listed is skipped, not masked.

Stability: experimental.
"""
