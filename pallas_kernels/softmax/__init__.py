"""The Two-Pass Softmax (Dukhan & Ablavatski, 2020, arXiv 2001.04438).

Stability: experimental.
"""

from jaxinfer.pallas_kernels.softmax.api import softmax

__all__ = ["softmax"]
