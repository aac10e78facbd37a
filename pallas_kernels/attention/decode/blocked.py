"""Decode in XLA: a loop over live blocks of the cache, several workers abreast, each a run of LeanAttention's split.

Sanovar et al. 2024, arXiv 2405.10480. A block is copied out of the cache and used while it is in the processor's own
cache, codes are turned into numbers there, and blocks that no query sees are not read. The copy makes a live block of
a float32 cache up to twice as dear as in one product over everything, so where at least half of such a cache is live,
or three quarters of a large one, that product is taken: the choice is made when the program runs.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.attention.decode.call import (
    FLOOR,
    Call,
    finish_scores,
    key_products,
    normalize,
    value_products,
    visible,
)
from jaxinfer.pallas_kernels.attention.decode.codes import Codes
from jaxinfer.pallas_kernels.attention.decode.items import Queries, State, as_rank, live_blocks, merge, tiles, untiled
from jaxinfer.pallas_kernels.attention.decode.schedule import parts_of, stream_k

# Measured on two cores: 512 tokens of two 64-wide heads fit the second-level cache; more workers gain nothing there.
BLOCK, WORKERS = 512, 4
TILE = 256  # query rows of a key head at a time: more only where one cache is shared by many rows
WHOLE_ROWS = 64  # up to so many query rows, the scores of a whole cache are smaller than the cache
# Keys are so many numbers: SMALL ones are read at once whatever is live, in less time than a schedule takes; LARGE ones
# stay in no processor's own memory, where the copy of a block costs least; XLA turns all of a bfloat16 cache into
# float32 before it multiplies, which for more than LARGE_HALF goes through main memory.
SMALL, LARGE_HALF, LARGE = 2**20, 2**22, 2**24


def attend(call: Call, q, k, v, lengths, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """As `decode`."""

    def in_blocks() -> tuple[jax.Array, jax.Array]:
        return untiled(call, *items(call, queries, k, v, lengths, slopes))

    def at_once() -> tuple[jax.Array, jax.Array]:
        return whole(call, q, k, v, lengths, positions, slopes)

    block = call.block_near(BLOCK)
    longest = -(-call.capacity // block)
    queries = tiles(call, q, positions, TILE)
    if call.repeat * call.queries > WHOLE_ROWS or call.block is not None or call.invariant:
        return in_blocks()
    if longest == 1 or call.numbers <= SMALL:
        return at_once()
    if call.keys.coded or call.values.coded or (call.values.kind != "float32" and call.numbers > LARGE_HALF):
        return in_blocks()
    begin, end = live_blocks(call, queries, lengths, block)
    total = jnp.maximum(end - begin, 0).sum()
    share = 0.5 if call.numbers <= LARGE else 0.75
    return lax.cond(total >= share * begin.shape[0] * longest, at_once, in_blocks)


def whole(call: Call, q, k, v, lengths, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """All of the cache in one step; what gradients differentiate."""
    queries = tiles(call, q, positions, call.repeat * call.queries)
    at = jnp.arange(call.capacity)
    state = _step(call, queries, k, v, at, lengths, slopes, None)
    return untiled(call, *normalize(*state))


def items(call: Call, queries: Queries, k, v, lengths, slopes) -> tuple[jax.Array, jax.Array]:
    """Attention of items, each over its row of the cache: `(out f32[N, G, M, d], lse f32[N, G, M])`."""
    count, groups, rows, dim = queries.q.shape
    block = call.block_near(BLOCK)
    longest = -(-call.capacity // block)
    workers = 1 if call.invariant else min(WORKERS, count * longest)
    schedule = stream_k(*live_blocks(call, queries, lengths, block), workers=workers, longest=longest)
    worker = jnp.arange(workers)

    def body(step: jax.Array, carry: tuple[State, jax.Array, State]) -> tuple[State, jax.Array, State]:
        state, before, parts = carry
        item, number, live = schedule.item[step], schedule.block[step], schedule.live[step]
        here = Queries(*(x[item] for x in queries))
        # The last block is moved back to end with the cache; what it has in common with the one before is masked.
        start = jnp.minimum(number * block, call.capacity - block)
        at = start[:, None] + jnp.arange(block)
        at = jnp.where(live[:, None] & (at >= (number * block)[:, None]), at, call.capacity)
        k_block = _slices(k, here.row, start, block, call, 3 if call.transposed else 2)
        v_block = _slices(v, here.row, start, block, call, 2)
        fresh = item != before
        state = jax.tree.map(lambda x, zero: jnp.where(as_rank(fresh, x), zero, x), state, empty)
        state = _step(call, here, k_block, v_block, at, lengths[here.row], slopes, state)
        slot = jnp.where(live, item + worker, count + workers)
        parts = jax.tree.map(lambda kept, x: kept.at[slot].set(x, mode="drop"), parts, state)
        return state, item, parts

    def start_of(many: int) -> State:
        total = jnp.zeros((many, groups, rows))
        return State(jnp.full_like(total, _floor(call)), total, jnp.zeros((many, groups, rows, dim)))

    empty = start_of(workers)
    carry = (empty, jnp.full(workers, -1, jnp.int32), start_of(count + workers - 1))
    *_, parts = lax.fori_loop(0, schedule.steps, body, carry)
    slots, there = parts_of(schedule, workers)
    return normalize(*merge(State(*(x[slots] for x in parts)), there))


def _step(call: Call, queries: Queries, k, v, at, lengths, slopes, state: State | None) -> State:
    """Take keys at positions `at[N or none, c]` into the softmax of queries `[N, G, M, d]`; the first with None."""
    count, groups, rows, _ = queries.q.shape
    raw = key_products(queries.q.astype(jnp.float32), k, call.transposed)
    at, mine = jnp.broadcast_to(at, (count, at.shape[-1]))[:, None], queries.positions[:, :, None]
    seen = visible(call, at, lengths[:, None, None], mine)
    raw = raw.reshape(count, groups, call.repeat, -1, at.shape[-1])
    slopes = None if slopes is None else slopes.reshape(groups, call.repeat, 1, 1)
    score = finish_scores(call, raw, seen[:, None, None], (mine - at)[:, None, None], slopes)
    score = score.reshape(count, groups, rows, -1)
    # The maximum cancels from the result, so it needs no gradient.
    peak = jnp.full(score.shape[:3], _floor(call))
    if call.unified_max is None:
        peak = lax.stop_gradient(jnp.maximum(peak if state is None else state.peak, score.max(-1)))
    weight = jnp.exp(score - peak[..., None])
    total, out = weight.sum(-1), value_products(weight, v)
    if state is None:
        return State(peak, total, out)
    keep = jnp.exp(state.peak - peak)
    return State(peak, state.total * keep + total, state.out * keep[..., None] + out)


def _floor(call: Call) -> float:
    """Where a maximum starts; a unified maximum stays there."""
    return FLOOR if call.unified_max is None else call.unified_max


def _slices(x: jax.Array | Codes, rows: jax.Array, starts: jax.Array, size: int, call: Call, axis: int) -> Any:
    """Tokens `starts[w]` to `starts[w] + size` of rows `rows[w]`; tokens, and groups of codes, lie along `axis`."""

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

    def cut_bits(leaf: jax.Array) -> jax.Array:
        if leaf.dtype != jnp.bfloat16:
            return cut(leaf)
        # On CPU XLA slices no bfloat16: it would turn all of the cache into float32 before the loop. The barrier ties
        # the cache to the step, so that the bits too are read a block at a time.
        leaf, _ = lax.optimization_barrier((leaf, starts))
        return cut(leaf.view(jnp.uint16)).view(jnp.bfloat16)

    return jax.tree.map(cut_bits, x)
