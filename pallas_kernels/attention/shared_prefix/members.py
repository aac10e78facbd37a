"""Which rows read which prefix: the queries of a prefix's rows side by side, so that its keys are read once for all.

A pair is a row and a level of its path. Pairs of one prefix fill tiles of a fixed size, the last of each prefix in
part; `ceil(pairs / size) + prefixes` tiles are enough however the rows are spread.

Stability: internal.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Members(NamedTuple):
    """`prefix i32[tiles]` of each tile, `pair i32[tiles, size]` in it (-1 none), `slot i32[pairs]` of each pair.

    A pair without a prefix has the slot `tiles * size`, one past the end.
    """

    prefix: jax.Array
    pair: jax.Array
    slot: jax.Array


def pack(prefixes: jax.Array, count: int, size: int) -> Members:
    """Tiles of up to `size` pairs of one prefix; `prefixes i32[pairs]` are 0 to count - 1, or negative for none."""
    pairs = prefixes.shape[0]
    tiles = -(-pairs // size) + min(count, pairs)
    nodes = jnp.where(prefixes < 0, count, prefixes)
    order = jnp.argsort(nodes, stable=True)
    sizes = jnp.zeros(count + 1, jnp.int32).at[nodes].add(1)
    starts = jnp.cumsum(sizes) - sizes
    tiles_of = -(-sizes[:count] // size)
    tile_ends = jnp.cumsum(tiles_of)
    first = jnp.append(tile_ends - tiles_of, 0)
    ranked = nodes[order]
    slot = first[ranked] * size + jnp.arange(pairs) - starts[ranked]
    slot = jnp.where(ranked == count, tiles * size, slot)
    pair = jnp.full(tiles * size, -1, jnp.int32).at[slot].set(order.astype(jnp.int32), mode="drop")
    prefix = jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right", method="compare_all")
    prefix = jnp.minimum(prefix, count - 1).astype(jnp.int32)
    return Members(prefix, pair.reshape(tiles, size), jnp.zeros(pairs, jnp.int32).at[order].set(slot))
