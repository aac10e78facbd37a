"""Decode in XLA: a loop over live blocks of the cache, several workers abreast, each a run of LeanAttention's split.

Sanovar et al. 2024, arXiv 2405.10480. A block is copied out of the cache and used while it is in the processor's own
cache, codes are turned into numbers there, and blocks that no query sees are not read. The copy makes a live block of a
float32 cache up to twice as dear as in one product over everything, so where at least half of such a cache is live, that
product is taken: the choice is made when the program runs.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.attention.decode.call import FLOOR, Call, finish_scores, floats, normalize, visible
from jaxinfer.pallas_kernels.attention.decode.codes import Codes
from jaxinfer.pallas_kernels.attention.decode.schedule import parts_of, stream_k

# Measured on two cores: 512 tokens of two 64-wide heads fit the second-level cache; more workers gain nothing there.
BLOCK, WORKERS = 512, 4
TILE = 256  # query rows of a key head at a time: more only where one cache is shared by many rows
WHOLE_ROWS = 64  # up to so many query rows, the scores of a whole cache are smaller than the cache


class Queries(NamedTuple):
    """Queries in tiles, the items of the schedule: `q f32[N, G, R * t, d]` and `positions i32[N, t]`, -1 for none.

    Item `i` belongs to row `i // (N / B)`.
    """

    q: jax.Array
    positions: jax.Array


class State(NamedTuple):
    """A softmax under way: `peak, total [..., M]` and `out [..., M, d]`, unnormalized."""

    peak: jax.Array
    total: jax.Array
    out: jax.Array


def attend(call: Call, q, k, v, lengths, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """As `decode`."""
    block = call.block_near(BLOCK)
    longest = -(-call.capacity // block)
    queries = tiles(call, q, positions, TILE)
    begin, end = live_blocks(call, queries.positions, lengths, block)
    arrays = (k, v, lengths, slopes)

    def in_blocks() -> tuple[jax.Array, jax.Array]:
        return _in_blocks(call, queries, begin, end, *arrays, block=block)

    def at_once() -> tuple[jax.Array, jax.Array]:
        return whole(call, q, k, v, lengths, positions, slopes)

    small = call.repeat * call.queries <= WHOLE_ROWS and call.keys.kind == call.values.kind == "float32"
    if not small or call.block is not None or call.invariant:
        return in_blocks()
    if longest == 1:
        return at_once()
    total = jnp.maximum(end - begin, 0).sum()
    return lax.cond(2 * total >= begin.shape[0] * longest, at_once, in_blocks)


def whole(call: Call, q, k, v, lengths, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """All of the cache in one step; what gradients differentiate."""
    queries = tiles(call, q, positions, call.repeat * call.queries)
    at = jnp.arange(call.capacity)
    state = _step(call, queries, k, v, at, lengths, slopes, None)
    return _untiled(call, *normalize(*state), q.dtype)


def tiles(call: Call, q: jax.Array, positions: jax.Array, rows: int) -> Queries:
    """Cut the queries `[B, H, T, d]` into tiles of at most `rows` rows a key head."""
    length = min(max(rows // call.repeat, 1), call.queries)
    count = -(-call.queries // length)
    pad = count * length - call.queries
    q = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, pad), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1)
    q = q.reshape(call.batch, call.groups, call.repeat, count, length, call.dim)
    q = jnp.moveaxis(q, 3, 1).reshape(call.batch * count, call.groups, call.repeat * length, call.dim)
    return Queries(q, positions.reshape(call.batch * count, length))


def live_blocks(call: Call, positions: jax.Array, lengths: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The blocks `begin <= i < end` (i32[N]) that some query of a tile `positions[N, t]` sees."""
    stop = jnp.minimum(jnp.repeat(lengths, positions.shape[0] // call.batch), positions.max(1) + 1)
    end = (jnp.maximum(stop, 0) + block - 1) // block
    if call.window is None:
        return jnp.zeros_like(end), end
    oldest = jnp.where(positions < 0, call.capacity, positions).min(1)
    return jnp.clip(oldest - call.window + 1, 0, end * block) // block, end


def _in_blocks(call: Call, queries: Queries, begin, end, k, v, lengths, slopes, *, block: int):
    items, groups, rows, dim = queries.q.shape
    tiles_a_row = items // call.batch
    workers = 1 if call.invariant else min(WORKERS, items * -(-call.capacity // block))
    schedule = stream_k(begin, end, workers=workers, longest=-(-call.capacity // block))
    worker = jnp.arange(workers)

    def body(step: jax.Array, carry: tuple[State, jax.Array, State]) -> tuple[State, jax.Array, State]:
        state, before, parts = carry
        item, number, live = schedule.item[step], schedule.block[step], schedule.live[step]
        row = item // tiles_a_row
        # The last block is moved back to end with the cache; what it has in common with the one before is masked.
        start = jnp.minimum(number * block, call.capacity - block)
        at = start[:, None] + jnp.arange(block)
        at = jnp.where(live[:, None] & (at >= (number * block)[:, None]), at, call.capacity)
        k_block = _slices(k, row, start, block, call, 3 if call.transposed else 2)
        v_block = _slices(v, row, start, block, call, 2)
        fresh = item != before
        state = jax.tree.map(lambda x, zero: jnp.where(_as_rank(fresh, x), zero, x), state, empty)
        here = Queries(queries.q[item], queries.positions[item])
        state = _step(call, here, k_block, v_block, at, lengths[row], slopes, state)
        slot = jnp.where(live, item + worker, items + workers)
        parts = jax.tree.map(lambda kept, x: kept.at[slot].set(x, mode="drop"), parts, state)
        return state, item, parts

    def start_of(count: int) -> State:
        total = jnp.zeros((count, groups, rows))
        return State(jnp.full_like(total, _floor(call)), total, jnp.zeros((count, groups, rows, dim)))

    empty = start_of(workers)
    carry = (empty, jnp.full(workers, -1, jnp.int32), start_of(items + workers - 1))
    *_, parts = lax.fori_loop(0, schedule.steps, body, carry)
    slots, there = parts_of(schedule, workers)
    merged = merge(State(*(x[slots] for x in parts)), there)
    return _untiled(call, *normalize(*merged), call.dtype)


def merge(parts: State, there: jax.Array) -> State:
    """Merge the parts `[N, W, ...]` of each item, those that are `there bool[N, W]`."""
    there = _as_rank(there, parts.peak)
    peak = jnp.where(there, parts.peak, FLOOR).max(1)
    weight = jnp.where(there, jnp.exp(parts.peak - peak[:, None]), 0.0)
    return State(peak, (parts.total * weight).sum(1), (parts.out * weight[..., None]).sum(1))


def _step(call: Call, queries: Queries, k, v, at, lengths, slopes, state: State | None) -> State:
    """Take keys at positions `at[N or none, c]` into the softmax of queries `[N, G, M, d]`; the first with None."""
    items, groups, rows, _ = queries.q.shape
    k, v = floats(k, -2 if call.transposed else -1), floats(v, -1)
    raw = jnp.einsum("ngmd,ngdc->ngmc" if call.transposed else "ngmd,ngcd->ngmc", queries.q, k)
    at, mine = jnp.broadcast_to(at, (items, at.shape[-1]))[:, None], queries.positions[:, :, None]
    seen = visible(call, at, lengths[:, None, None], mine)
    raw = raw.reshape(items, groups, call.repeat, -1, at.shape[-1])
    slopes = None if slopes is None else slopes.reshape(groups, call.repeat, 1, 1)
    score = finish_scores(call, raw, seen[:, None, None], (mine - at)[:, None, None], slopes)
    score = score.reshape(items, groups, rows, -1)
    # The maximum cancels from the result, so it needs no gradient.
    peak = jnp.full(score.shape[:3], _floor(call))
    if call.unified_max is None:
        peak = lax.stop_gradient(jnp.maximum(peak if state is None else state.peak, score.max(-1)))
    weight = jnp.exp(score - peak[..., None])
    total, out = weight.sum(-1), jnp.einsum("ngmc,ngcd->ngmd", weight, v)
    if state is None:
        return State(peak, total, out)
    keep = jnp.exp(state.peak - peak)
    return State(peak, state.total * keep + total, state.out * keep[..., None] + out)


def _floor(call: Call) -> float:
    """Where a maximum starts; a unified maximum stays there."""
    return FLOOR if call.unified_max is None else call.unified_max


def _slices(x: jax.Array | Codes, rows: jax.Array, starts: jax.Array, size: int, call: Call, axis: int) -> Any:
    """Tokens `starts[w]` to `starts[w] + size` of rows `rows[w]`; the tokens lie along `axis`, as do groups of codes."""

    def cut(leaf: jax.Array) -> jax.Array:
        group = call.capacity // leaf.shape[axis]
        shape = list(leaf.shape)
        shape[0] = 1
        shape[axis] = max(size // group, 1)
        zero = jnp.zeros_like(starts[0])

        def one(row: jax.Array, start: jax.Array) -> jax.Array:
            index = [row, zero, zero, zero]
            index[axis] = start // group
            return lax.dynamic_slice(leaf, index, shape)

        cuts = [one(rows[w], starts[w]) for w in range(rows.shape[0])]
        return cuts[0] if len(cuts) == 1 else jnp.concatenate(cuts)

    return jax.tree.map(cut, x)


def _as_rank(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim))


def _untiled(call: Call, out: jax.Array, lse: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Tiles `[N, G, R * t, ...]` back as `[B, H, T, ...]`."""
    count = out.shape[0] // call.batch

    def back(x: jax.Array) -> jax.Array:
        x = x.reshape(call.batch, count, call.groups, call.repeat, -1, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(call.batch, call.heads, -1, *x.shape[5:])[:, :, : call.queries]

    return back(out).astype(dtype), back(lse)
