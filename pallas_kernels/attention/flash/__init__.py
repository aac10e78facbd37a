"""FlashAttention: exact attention in memory linear in the length, forward and backward.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.attention.flash.api import flash

__all__ = ["flash"]
