"""Integer products: int8 activations by weights of 8 bits or fewer.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.matmul.int8acts.api import int8_matmul
from jaxinfer.pallas_kernels.matmul.int8acts.ref import quantize_rows

__all__ = ["int8_matmul", "quantize_rows"]
