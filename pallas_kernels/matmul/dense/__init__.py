"""Products of few rows with dense float weights: what one decoding step spends most of its time on.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.matmul.dense.api import FORMS, TRANSPOSED_FORMS, dense, dense_transposed
from jaxinfer.pallas_kernels.matmul.dense.call import Call

__all__ = ["FORMS", "TRANSPOSED_FORMS", "Call", "dense", "dense_transposed"]
