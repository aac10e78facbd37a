"""Honest timing: interleaved medians, the machine's limits, latency curves and the roofline share.

Stability: experimental.
"""
