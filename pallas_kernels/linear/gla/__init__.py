"""Gated linear attention: linear attention with a gate a channel and token.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.linear.gla.api import gla, gla_step

__all__ = ["gla", "gla_step"]
