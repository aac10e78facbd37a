"""Prefix attention as decode of packed queries: a prefix is a row of the cache, the queries of its rows are its items.

Hydragen (Juravsky et al. 2024, arXiv 2402.05099): attention of many rows to one prefix is a product of matrices where
decode row by row is many products of a matrix and a vector. Each form of decode serves, since all it sees is items.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.combine import combine
from jaxinfer.pallas_kernels.attention.decode.call import Call, finish_scores, visible
from jaxinfer.pallas_kernels.attention.decode.items import Queries
from jaxinfer.pallas_kernels.attention.shared_prefix.members import pack

BLOCK = 512


def attend(
    form: Callable, rows: int, call: Call, q, k, v, lengths, paths, starts, positions, slopes
) -> tuple[jax.Array, jax.Array]:
    """Attention of the rows to the prefixes on their paths; `form` is decode's for items, `rows` query rows a tile."""
    levels = paths.shape[1]
    size = max(rows // (call.repeat * call.queries), 1)
    members = pack(paths.reshape(-1), call.batch, min(size, paths.size))
    row, level = members.pair // levels, members.pair % levels
    # Positions within the prefix; a slot without a pair has queries that see nothing.
    local = jnp.where((members.pair >= 0)[..., None], positions[row] - starts[row, level][..., None], -1)
    tiles = members.pair.shape[0]
    grouped = q.reshape(q.shape[0], call.groups, call.repeat, call.queries, call.dim)
    packed = jnp.moveaxis(grouped[row], 1, 3)  # [tiles, G, R, members, T, d]
    items = Queries(
        packed.reshape(tiles, call.groups, -1, call.dim), local.reshape(tiles, -1).astype(jnp.int32), members.prefix
    )
    out, lse = form(call, items, k, v, lengths, slopes)

    def unpacked(x: jax.Array, empty: float) -> jax.Array:
        x = x.reshape(tiles, call.groups, call.repeat, -1, call.queries, *x.shape[3:])
        x = jnp.moveaxis(x, 3, 1)
        x = x.reshape(-1, call.heads, *x.shape[4:]).at[members.slot].get(mode="fill", fill_value=empty)
        return x.reshape(-1, levels, *x.shape[1:])

    out, lse = unpacked(out, 0.0), unpacked(lse, -jnp.inf)
    out, lse = combine([(out[:, i], lse[:, i]) for i in range(levels)])
    return out.astype(call.dtype), lse


def differentiable(call: Call, q, k, v, lengths, paths, starts, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """The same by a scan over blocks of the prefixes that jax can differentiate, in memory linear in their length."""
    rows = q.shape[0] * call.heads * call.queries
    return attend(_scanned, rows, call, q, k, v, lengths, paths, starts, positions, slopes)


def _scanned(call: Call, items: Queries, k, v, lengths, slopes):
    block = min(BLOCK, call.capacity)
    count = -(-call.capacity // block)
    k = jnp.swapaxes(k, 2, 3) if call.transposed else k
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, count * block - call.capacity), (0, 0))) for x in (k, v))
    k, v = (jnp.moveaxis(x.reshape(*x.shape[:2], count, block, call.dim), 2, 0) for x in (k, v))
    mine = items.positions[:, None, None, :, None]
    limit = lengths[items.row][:, None, None, None, None]
    heads = None if slopes is None else slopes.reshape(call.groups, call.repeat, 1, 1)

    def step(part, xs):
        number, k, v = xs
        at = number * block + jnp.arange(block)
        k, v = (x[items.row].astype(jnp.float32) for x in (k, v))
        raw = jnp.einsum("ngmd,ngcd->ngmc", items.q.astype(jnp.float32), k)
        raw = raw.reshape(*raw.shape[:2], call.repeat, -1, block)
        seen = visible(call, at, limit, mine)
        score = finish_scores(call, raw, seen, mine - at, heads).reshape(*raw.shape[:2], -1, block)
        seen = jnp.broadcast_to(seen, raw.shape).reshape(score.shape)
        lse = jax.nn.logsumexp(score, -1, where=seen)
        weight = jnp.where(seen, jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
        return combine([part, (jnp.einsum("ngmc,ngcd->ngmd", weight, v), lse)]), None

    empty = jnp.zeros(items.q.shape, jnp.float32), jnp.full(items.q.shape[:3], -jnp.inf)
    return jax.lax.scan(jax.checkpoint(step), empty, (jnp.arange(count), k, v))[0]
