"""Attention kernels: every op returns `(out, lse)`, so that parts merge exactly (`combine`).

Stability: experimental.
"""
