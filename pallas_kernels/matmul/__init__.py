"""Products with weights: few rows against dense weights, and weights in low-bit formats.

Stability: experimental.
"""
