"""Key-value caches under one contract: attend reads, commit writes.

Stability: experimental.
"""

from jaxinfer.cache.base import (
    Block,
    Cache,
    Spec,
    View,
    commit,
    footprint,
    init,
    new_blocks,
    place,
    select,
    write_block,
)
from jaxinfer.cache.dense import Dense, ring

__all__ = [
    "Block",
    "Cache",
    "Dense",
    "Spec",
    "View",
    "commit",
    "footprint",
    "init",
    "new_blocks",
    "place",
    "ring",
    "select",
    "write_block",
]
