"""Attention over a list of key blocks for each block of queries: what is not listed is skipped, not masked.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.attention.block_sparse.api import block_sparse

__all__ = ["block_sparse"]
