"""Decode in XLA: a loop over the live blocks of all rows, one at a time, each shared by all cores.

LeanAttention (Sanovar et al. 2024, arXiv 2405.10480) lays the blocks of all items in one sequence, so that work is
equal whatever the lengths. A GPU cuts that sequence into runs, one a core. On a CPU the cores share the products of
each block instead, which is as equal, needs no merging, and took 0.6 to 0.95 of the time of two or four runs abreast
(2 cores).

A block is copied out of the cache and used while it is in the processor's own cache, codes are turned into numbers
there, and blocks that no query sees are not read. The copy makes a live block of a float32 cache one and a half times
as dear as in one product over everything, so where most of such a cache is live that product is taken: the choice is
made when the program runs, but for `invariant`, since it looks at all rows.

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
from jaxinfer.pallas_kernels.attention.decode.items import Queries, State, live_blocks, tiles, units, untiled

BLOCK = 512  # measured on two cores for 1 to 8 key heads of 32 to 128 channels: twice or half as much gains nothing
TILE = 256  # query rows of a key head at a time: more only where one cache is shared by many rows
WHOLE_ROWS = 64  # up to so many query rows, the scores of a whole cache are smaller than the cache
# Keys are so many numbers: SMALL ones are read at once whatever is live, in less time than a loop takes; XLA turns all
# of a bfloat16 cache into float32 before it multiplies, which for more than LARGE_HALF goes through main memory.
SMALL, LARGE_HALF = 2**20, 2**22
SHARE = 0.65  # of a float32 cache's blocks: where more are live, one product over all of them is faster


def attend(call: Call, q, k, v, lengths, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """As `decode`."""

    def in_blocks() -> tuple[jax.Array, jax.Array]:
        return untiled(call, *items(call, queries, k, v, lengths, slopes))

    def at_once() -> tuple[jax.Array, jax.Array]:
        return whole(call, q, k, v, lengths, positions, slopes)

    block = call.block_near(BLOCK)
    longest = -(-call.capacity // block)
    queries = tiles(call, q, positions, TILE)
    if call.repeat * call.queries > WHOLE_ROWS or call.block is not None:
        return in_blocks()
    if longest == 1 or call.numbers <= SMALL:
        return at_once()
    if call.keys.coded or call.values.coded or (call.values.kind != "float32" and call.numbers > LARGE_HALF):
        return in_blocks()
    if call.invariant:
        return in_blocks()
    begin, end = live_blocks(call, queries, lengths, block)
    total = jnp.maximum(end - begin, 0).sum()
    return lax.cond(total >= SHARE * begin.shape[0] * longest, at_once, in_blocks)


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
    begin, end = live_blocks(call, queries, lengths, block)
    total, item_of, number_of = units(begin, end, -(-call.capacity // block))

    def body(unit: jax.Array, carry: tuple[State, State]) -> tuple[State, State]:
        state, results = carry
        item, number = item_of[unit], number_of[unit]
        here = Queries(*(lax.dynamic_slice_in_dim(x, item, 1) for x in queries))
        # The last block is moved back to end with the cache; what it has in common with the one before is masked.
        start = jnp.minimum(number * block, call.capacity - block)
        at = start + jnp.arange(block)
        at = jnp.where(at >= number * block, at, call.capacity)
        k_block = _slice(k, here.row[0], start, block, call, 3 if call.transposed else 2)
        v_block = _slice(v, here.row[0], start, block, call, 2)
        state = jax.tree.map(lambda x, zero: jnp.where(number == begin[item], zero, x), state, empty)
        state = _step(call, here, k_block, v_block, at, lengths[here.row], slopes, state)
        results = jax.tree.map(lambda kept, x: lax.dynamic_update_slice_in_dim(kept, x, item, 0), results, state)
        return state, results

    def start_of(many: int) -> State:
        zeros = jnp.zeros((many, groups, rows))
        return State(jnp.full_like(zeros, _floor(call)), zeros, jnp.zeros((many, groups, rows, dim)))

    empty = start_of(1)
    return normalize(*lax.fori_loop(0, total, body, (empty, start_of(count)))[1])


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


def _slice(x: jax.Array | Codes, row: jax.Array, start: jax.Array, size: int, call: Call, axis: int) -> Any:
    """Tokens `start` to `start + size` of row `row`, `[1, G, ...]`; tokens, and groups of codes, lie along `axis`."""

    def cut(leaf: jax.Array) -> jax.Array:
        group = call.capacity // leaf.shape[axis]
        shape, index = list(leaf.shape), [row, *[jnp.zeros_like(start)] * 3]
        shape[0], shape[axis] = 1, max(size // group, 1)
        index[axis] = start // group
        return lax.dynamic_slice(leaf, index, shape)

    def cut_bits(leaf: jax.Array) -> jax.Array:
        if leaf.dtype != jnp.bfloat16:
            return cut(leaf)
        # On CPU XLA slices no bfloat16: it would turn all of the cache into float32 before the loop. The barrier ties
        # the cache to the step, so that the bits too are read a block at a time.
        leaf, _ = lax.optimization_barrier((leaf, start))
        return cut(leaf.view(jnp.uint16)).view(jnp.bfloat16)

    return jax.tree.map(cut_bits, x)
