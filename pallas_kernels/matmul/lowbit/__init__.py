"""Weight-only products: float activations by weights of 2 to 8 bits.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.matmul.lowbit.api import lowbit_matmul, lowbit_matmul_across

__all__ = ["lowbit_matmul", "lowbit_matmul_across"]
