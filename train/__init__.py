"""Training: one loop (`loop`), recipes on top of it (`lm`), and the built-in corpus (`data`).

Stability: experimental.
"""
