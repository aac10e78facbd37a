"""Products of activations rounded to 8 bits: int8 by weights of 8 bits or fewer, float8 by float8.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.matmul.acts8.api import float8_matmul, int8_matmul
from jaxinfer.pallas_kernels.matmul.acts8.ref import quantize_rows

__all__ = ["float8_matmul", "int8_matmul", "quantize_rows"]
