"""Block-sparse attention in XLA: listed key blocks are gathered into panels, and only they are read and multiplied.

The loops are those of `flash.blocked`: a panel is ..., 4, 2 or 1 listed blocks, as many as remain, so that products
stay about as wide as dense ones and the time is close to the density times the dense time.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.attention.block_sparse.call import Call
from jaxinfer.pallas_kernels.attention.flash.scores import NO_PEAK, UNSEEN, backward_rows, finish

PANEL_BLOCKS = 32  # of the widest panel, since each is a copy of its own in the program
PANEL_SCORES = 256 * 1024  # of the widest panel: in float32 they fit a core's cache


def forward(call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes):
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    del turned, turned_counts
    flash = call.flash
    numbers = jnp.tile(jnp.arange(call.q_blocks), flash.group)

    def head(xs):
        rows, lists, k, v, slopes, lengths = xs

        def block(xs):
            number, q, (order, count), slope = xs
            tile = _Tile(call, number, order, count, lengths, slope)

            def step(blocks: jax.Array, carry):
                peak, total, acc = carry
                keys, values = _gather(k, blocks), _gather(v, blocks)
                score = tile.masked(tile.scores(_dot(q, keys, 1, 1), blocks), blocks)
                new = jnp.maximum(peak, score.max(-1))
                shrink, weight = jnp.exp2(peak - new), jnp.exp2(score - new[:, None])
                acc = acc * shrink[:, None] + _dot(weight.astype(values.dtype), values, 1, 0)
                return new, total * shrink + weight.sum(-1), acc

            start = (
                jnp.full(call.block_q, NO_PEAK),
                jnp.zeros(call.block_q),
                jnp.zeros((call.block_q, flash.value_dim)),
            )
            peak, total, acc = tile.over_panels(step, start)
            return finish(peak, total, acc, q.dtype)

        return lax.map(block, (numbers, rows, lists, slopes))

    xs = (_rows(call, q), _lists(call, indices, counts), _keys(call, k), _keys(call, v))
    out, lse = lax.map(head, (*xs, _slopes(call, slopes), _lengths(call, q_lengths, kv_lengths)))
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def backward(
    call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes, out, lse, dout, dlse
):
    """`(dq, dk, dv)`; weights are computed again, from the log-sum-exp."""
    del turned, turned_counts
    flash = call.flash
    lse, delta = backward_rows(out, lse, dout, dlse)
    rows = tuple(_rows(call, x) for x in (q, dout.astype(v.dtype), lse, delta))
    numbers = jnp.tile(jnp.arange(call.q_blocks), flash.group)

    def head(xs):
        rows, lists, k, v, slopes, lengths = xs

        def block(carry, xs):
            number, (q, dout, lse, delta), (order, count), slope = xs
            tile = _Tile(call, number, order, count, lengths, slope)

            def step(blocks: jax.Array, carry):
                dq, dk, dv = carry
                keys, values = _gather(k, blocks), _gather(v, blocks)
                product = _dot(q, keys, 1, 1)
                weight = jnp.exp2(tile.masked(tile.scores(product, blocks), blocks) - lse[:, None])
                dscore = weight * (_dot(dout, values, 1, 1) - delta[:, None]) * flash.rules.slope_of_cap(product)
                dscore, weight = dscore.astype(q.dtype), weight.astype(q.dtype)
                dk = _scatter(dk, _dot(q, dscore, 0, 0), blocks)
                dv = _scatter(dv, _dot(dout, weight, 0, 0), blocks)
                return dq + _dot(dscore, keys, 1, 0), dk, dv

            dq, dk, dv = tile.over_panels(step, (jnp.zeros(q.shape, jnp.float32), *carry))
            return (dk, dv), (dq * flash.rules.scale).astype(q.dtype)

        zeros = tuple(jnp.zeros((call.k_blocks, size, call.block_k)) for size in (flash.dim, flash.value_dim))
        (dk, dv), dq = lax.scan(block, zeros, (numbers, rows, lists, slopes))
        return dq, (dk * flash.rules.scale).swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype)

    xs = (rows, _lists(call, indices, counts), _keys(call, k), _keys(call, v))
    dq, dk, dv = lax.map(head, (*xs, _slopes(call, slopes), _lengths(call, q_lengths, kv_lengths)))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


class _Tile:
    """One block of query rows: its list of key blocks, and its scores against a panel of them."""

    def __init__(self, call: Call, number, order, count, lengths, slope):
        self.call, self.order, self.count, self.slope = call, order, count, slope
        self.q_length, self.kv_length = (call.flash.queries, call.flash.keys) if lengths is None else lengths
        self.rows = number * call.block_q + lax.iota(jnp.int32, call.block_q)[:, None]
        self.positions = self.rows + (self.kv_length - self.q_length)

    def over_panels(self, step: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        """`step(block numbers of a panel, carry)` over the list, the widest panels first."""
        at, left = jnp.zeros((), jnp.int32), self.count
        width, area = 1, self.call.block_q * self.call.block_k
        while 2 * width * area <= PANEL_SCORES and 2 * width <= min(self.call.listed, PANEL_BLOCKS):
            width *= 2
        while width:
            turns = left // width

            def turn(j, carry, at=at, width=width):
                return step(lax.dynamic_slice_in_dim(self.order, at + j * width, width), carry)

            carry = lax.fori_loop(0, turns, turn, carry)
            at, left, width = at + turns * width, left - turns * width, width // 2
        return carry

    def keys(self, blocks: jax.Array) -> jax.Array:
        """The key numbers of a panel, i32[1, keys]."""
        return (blocks[:, None] * self.call.block_k + lax.iota(jnp.int32, self.call.block_k)).reshape(1, -1)

    def scores(self, product: jax.Array, blocks: jax.Array) -> jax.Array:
        return self.call.flash.rules.scores(product, self.positions - self.keys(blocks), self.slope)

    def masked(self, score: jax.Array, blocks: jax.Array) -> jax.Array:
        """Scores with those that are not seen far below all others."""
        keys = self.keys(blocks)
        seen = self.call.flash.rules.visible(self.positions - keys)
        if self.call.flash.ragged:
            inside = (keys < self.kv_length) & (self.rows < self.q_length)
            seen = inside if seen is None else seen & inside
        return score if seen is None else jnp.where(seen, score, UNSEEN)


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


def _gather(blocks: jax.Array, numbers: jax.Array) -> jax.Array:
    """Blocks side by side, `[keys of the panel, size]`."""
    found = [lax.dynamic_index_in_dim(blocks, numbers[i], keepdims=False) for i in range(numbers.shape[0])]
    return jnp.concatenate(found)  # copies of whole blocks, which a gather does an element at a time


def _scatter(total: jax.Array, part: jax.Array, numbers: jax.Array) -> jax.Array:
    """Add a panel's columns `part[size, keys]` to its blocks in `total[k_blocks, size, block_k]`."""
    size, width = total.shape[1:]

    # A loop: in straight line XLA fuses one update with the next one's read, and copies the total in between.
    def add(i, total):
        new = lax.dynamic_slice(part, (0, i * width), (size, width))
        old = lax.dynamic_index_in_dim(total, numbers[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + new, numbers[i], 0)

    return lax.fori_loop(0, numbers.shape[0], add, total)


def _rows(call: Call, x: jax.Array) -> jax.Array:
    """`[B, H, T, ...]` as the blocks that read each key head: `[B G, group q_blocks, block_q, ...]`."""
    return x.reshape(-1, call.flash.group * call.q_blocks, call.block_q, *x.shape[3:])


def _keys(call: Call, x: jax.Array) -> jax.Array:
    """`[B, G, S, size]` as `[B G, k_blocks, block_k, size]`."""
    return x.reshape(-1, call.k_blocks, call.block_k, x.shape[-1])


def _lists(call: Call, indices: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The list and count of each of `_rows`' blocks."""
    shape = (call.flash.batch, call.flash.heads)
    every = (jnp.broadcast_to(x, (*shape, *x.shape[2:])) for x in (indices, counts))
    order, count = (x.reshape(-1, call.flash.group * call.q_blocks, *x.shape[3:]) for x in every)
    return order, count


def _slopes(call: Call, slopes: jax.Array | None) -> jax.Array | None:
    """The slope of each of `_rows`' blocks."""
    if slopes is None:
        return None
    each = jnp.repeat(slopes.reshape(call.flash.kv_heads, -1), call.q_blocks, 1)
    return jnp.tile(each, (call.flash.batch, 1))


def _lengths(call: Call, q_lengths, kv_lengths) -> tuple[jax.Array, jax.Array] | None:
    """Both lengths for each of `[B G]`, or None where all rows are whole."""
    if not call.flash.ragged:
        return None
    return jnp.repeat(q_lengths, call.flash.kv_heads), jnp.repeat(kv_lengths, call.flash.kv_heads)
