"""Queries in tiles, the items that are split over workers, and softmaxes under way: what the forms share.

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


def merge(parts: State, there: jax.Array) -> State:
    """Merge the parts `[N, W, ...]` of each item, those that are `there bool[N, W]`; the others may be anything."""
    there = as_rank(there, parts.peak)
    peak = jnp.where(there, parts.peak, FLOOR).max(1)
    weight = jnp.where(there, jnp.exp(parts.peak - peak[:, None]), 0.0)
    total = jnp.where(there, parts.total * weight, 0.0).sum(1)
    return State(peak, total, jnp.where(there[..., None], parts.out * weight[..., None], 0.0).sum(1))


def as_rank(x: jax.Array, like: jax.Array) -> jax.Array:
    """Trailing axes of one, so that `x` broadcasts against `like`."""
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim))
