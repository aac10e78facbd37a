"""Products of few rows with dense float weights: what one decoding step spends most of its time on.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.matmul.dense.api import FORMS, dense

__all__ = ["FORMS", "dense"]
