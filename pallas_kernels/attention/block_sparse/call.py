"""The static side of a call of `block_sparse`, and its lists turned round for the backward pass.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.attention.flash.call import Call as FlashCall


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `flash` in `block`-sized blocks, of which `listed` are listed for each block of queries at most.

    `turned`: the most blocks of queries that any block of keys is listed for, over the heads that read it. `shared`:
    one list serves all heads. `together`, `uneven`: what `blocked.together` says.
    """

    flash: FlashCall
    block_q: int
    block_k: int
    listed: int
    turned: int
    shared: bool = False
    together: int = 1
    uneven: bool = False

    @property
    def share(self) -> int:
        """Query heads whose rows the blocked form takes as rows of one block."""
        return self.flash.group if self.shared else 1

    @property
    def rows(self) -> int:
        """Rows of such a block."""
        return self.share * self.block_q

    @property
    def q_blocks(self) -> int:
        return self.flash.queries // self.block_q

    @property
    def k_blocks(self) -> int:
        return self.flash.keys // self.block_k


def turn(indices: Any, counts: Any, heads: int, group: int, k_blocks: int) -> tuple[Any, Any]:
    """For each block of keys, the query blocks that list it: `i32[b, g, k_blocks, n]` and their counts.

    `indices i32[b, h, q_blocks, listed]`, `counts i32[b, h, q_blocks]`, h = `heads` or 1. An entry is r * q_blocks + i
    for block i of the r-th head of the `group` that reads the key head. n is the longest list where the lists are
    numpy arrays, and group * q_blocks where they are traced.
    """
    traced = isinstance(indices, jax.Array) or isinstance(counts, jax.Array)
    xp: Any = jnp if traced else np
    b, _, q_blocks, listed = indices.shape
    live = xp.arange(listed) < counts[..., None]
    hit = ((indices[..., None] == xp.arange(k_blocks)) & live[..., None]).any(3)  # [b, h, q_blocks, k_blocks]
    hit = (
        xp.broadcast_to(hit, (b, heads, q_blocks, k_blocks))
        .reshape(b, heads // group, group * q_blocks, k_blocks)
        .swapaxes(2, 3)
    )
    turned = hit.sum(-1).astype(xp.int32)
    order = xp.argsort(~hit, axis=-1, stable=True)  # hits first, in order
    longest = group * q_blocks if traced else max(1, int(turned.max(initial=0)))
    return order[..., :longest].astype(xp.int32), turned


def dense_blocks(indices: Any, counts: Any, k_blocks: int) -> jax.Array:
    """Which blocks are listed, bool[b, h, q_blocks, k_blocks]."""
    live = jnp.arange(indices.shape[-1]) < counts[..., None]
    return ((indices[..., None] == jnp.arange(k_blocks)) & live[..., None]).any(-2)
