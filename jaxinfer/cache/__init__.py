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
from jaxinfer.cache.int8 import Int8, Int8Cache
from jaxinfer.cache.retrieval import Retrieval
from jaxinfer.cache.sink import Sink, SinkCache

__all__ = [
    "Block",
    "Cache",
    "Dense",
    "Int8",
    "Int8Cache",
    "Retrieval",
    "Sink",
    "SinkCache",
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
