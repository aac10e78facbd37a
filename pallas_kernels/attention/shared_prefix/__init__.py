"""Shared prefixes: many rows attend to prefixes that are kept once, in trees, and to suffixes of their own.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.attention.shared_prefix.api import shared_prefix

__all__ = ["shared_prefix"]
