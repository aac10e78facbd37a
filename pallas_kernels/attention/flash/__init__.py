"""FlashAttention: exact attention in memory linear in the length, forward and backward.

Stability: experimental.
"""
