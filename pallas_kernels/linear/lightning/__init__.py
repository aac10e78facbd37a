"""Lightning Attention-2: linear attention with a constant decay a head.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.linear.lightning.api import lightning, lightning_step

__all__ = ["lightning", "lightning_step"]
