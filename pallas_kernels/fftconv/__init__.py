"""FlashFFTConv: long convolutions through Monarch products (Fu et al., 2023, arXiv 2311.05908).

Stability: experimental.
"""

from jaxinfer.pallas_kernels.fftconv.api import fftconv, transform_sizes

__all__ = ["fftconv", "transform_sizes"]
