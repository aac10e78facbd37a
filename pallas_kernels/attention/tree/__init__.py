"""Speculative trees: the nodes of a tree of drafts attend to a cache and to their ancestors.

Stability: experimental.
"""

from jaxinfer.pallas_kernels.attention.tree.api import pack_ancestors, tree, unpack_ancestors

__all__ = ["pack_ancestors", "tree", "unpack_ancestors"]
