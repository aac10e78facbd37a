"""Queries in tiles, the items that they are and their live blocks, and softmaxes under way: what the forms share.

Stability: internal.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.decode.call import FLOOR, Call


class Queries(NamedTuple):
    """Items: `q [N, G, R * t, d]`, `positions i32[N, t]` (-1 for none), `row i32[N]` of the cache that they read."""

    q: jax.Array
    positions: jax.Array
    row: jax.Array


class State(NamedTuple):
    """A softmax under way: `peak, total [..., M]` and `out [..., M, d]`, unnormalized."""

    peak: jax.Array
    total: jax.Array
    out: jax.Array


def tiles(call: Call, q: jax.Array, positions: jax.Array, rows: int) -> Queries:
    """Cut the queries `[B, H, T, d]` into tiles of at most `rows` rows a key head."""
    length = min(max(rows // call.repeat, 1), call.queries)
    count = -(-call.queries // length)
    pad = count * length - call.queries
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1)
    q = q.reshape(call.batch, call.groups, call.repeat, count, length, call.dim)
    q = jnp.moveaxis(q, 3, 1).reshape(call.batch * count, call.groups, call.repeat * length, call.dim)
    row = jnp.repeat(jnp.arange(call.batch, dtype=jnp.int32), count)
    return Queries(q, positions.reshape(call.batch * count, length), row)


def untiled(call: Call, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tiles `[N, G, R * t, ...]` back as `[B, H, T, ...]`, the output in the queries' dtype."""
    count = out.shape[0] // call.batch

    def back(x: jax.Array) -> jax.Array:
        x = x.reshape(call.batch, count, call.groups, call.repeat, -1, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(call.batch, call.heads, -1, *x.shape[5:])[:, :, : call.queries]

    return back(out).astype(call.dtype), back(lse)


def live_blocks(call: Call, queries: Queries, lengths: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The blocks `begin <= i < end` (i32[N]) that some query of an item sees; `lengths i32[B]` of the cache's rows."""
    stop = jnp.minimum(lengths[queries.row], queries.positions.max(1) + 1)
    end = (jnp.maximum(stop, 0) + block - 1) // block
    if call.window is None:
        return jnp.zeros_like(end), end
    oldest = jnp.where(queries.positions < 0, call.capacity, queries.positions).min(1)
    return jnp.clip(oldest - call.window + 1, 0, end * block) // block, end


def units(begin: jax.Array, end: jax.Array, longest: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks `begin <= i < end` (i32[N]) of all items in one sequence, item after item: LeanAttention's units.

    Returns their number `i32[]`, and the item and the block of each, `i32[N * longest]`; what lies beyond is anything.
    """
    counts = jnp.maximum(end - begin, 0)
    ends = jnp.cumsum(counts)
    unit = jnp.arange(begin.shape[0] * longest, dtype=jnp.int32)
    item = jnp.searchsorted(ends, unit, side="right", method="compare_all").astype(jnp.int32)
    item = jnp.minimum(item, begin.shape[0] - 1)
    return ends[-1], item, begin[item] + unit - (ends - counts)[item]


def merge(parts: State, there: jax.Array) -> State:
    """Merge the parts `[N, W, ...]` of each item, those that are `there bool[N, W]`; the others may be anything."""
    there = there.reshape(*there.shape, *(1,) * (parts.peak.ndim - there.ndim))
    peak = jnp.where(there, parts.peak, FLOOR).max(1)
    weight = jnp.where(there, jnp.exp(parts.peak - peak[:, None]), 0.0)
    total = jnp.where(there, parts.total * weight, 0.0).sum(1)
    return State(peak, total, jnp.where(there[..., None], parts.out * weight[..., None], 0.0).sum(1))
