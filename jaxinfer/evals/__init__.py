"""How good samples are: distances between sets of samples, and what a small classifier sees in them.

Stability: experimental.
"""
