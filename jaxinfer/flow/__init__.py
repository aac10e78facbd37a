"""Latent flow matching: paths, couplings, objectives, guidance and solvers as pure functions in seven slots.

t = 0 is the source (noise), t = 1 the data, everywhere; times are float32[B].

Stability: experimental.
"""
