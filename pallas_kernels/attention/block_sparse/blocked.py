"""Block-sparse attention in XLA: listed key blocks are gathered into panels, and only they are read and multiplied.

The arithmetic is that of `flash.blocked`: a panel is ..., 4, 2 or 1 listed blocks, as many as remain, so that products
stay about as wide as dense ones and the time is close to the density times the dense time. Where panels are still
small, several blocks of rows whose lists are known to be about as long take a step together, as batched products; query
heads that read one key head by one list are rows of one block, so that a gathered panel serves them all.

On a CPU blocks of 128 and more run at 1.2 to 1.6 of density times dense, blocks of 64 at about 2: products of 64 rows
alone take as long as the dense loop's whole step for as many scores.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.pallas_kernels.attention.block_sparse.call import Call
from jaxinfer.pallas_kernels.attention.flash import panel
from jaxinfer.pallas_kernels.attention.flash.panel import dot
from jaxinfer.pallas_kernels.attention.flash.scores import backward_rows, finish

PANEL_BLOCKS = 32  # of the widest panel, since each is a copy of its own in the program
PANEL_SCORES = 256 * 1024  # of a step: in float32 they fit a core's cache
WASTE = 1.1  # blocks computed over blocks listed, where rows of unlike lists take steps together


def forward(call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes):
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    del turned, turned_counts
    flash, axis = call.flash, _axis(call)

    def head(xs):
        steps, k, v, lengths = xs

        def step(xs):
            walk, (q,) = _Walk(call, xs, lengths), xs[0]

            def meet(blocks: jax.Array, keys: jax.Array, carry):
                score = walk.rows.scores(dot(q, _panel(k, blocks, 1 - axis), axis, axis), keys)
                return panel.attend(carry, score, _panel(v, blocks, 0))

            peak, total, acc = walk.over_panels(meet, panel.start(walk.shape, flash.value_dim))
            return finish(peak, total, acc, q.dtype)

        return lax.map(step, steps)

    steps = ((_turned(_rows(call, q), axis),), *_lists(call, indices, counts), _slopes(call, slopes))
    keys = (_turned(_keys(call, k), axis), _keys(call, v))
    out, lse = lax.map(head, (steps, *keys, _lengths(call, q_lengths, kv_lengths)))
    return _heads(call, out), _heads(call, lse)


def backward(
    call: Call, q, k, v, indices, counts, turned, turned_counts, q_lengths, kv_lengths, slopes, out, lse, dout, dlse
):
    """`(dq, dk, dv)`; weights are computed again, from the log-sum-exp."""
    del turned, turned_counts
    flash, axis = call.flash, _axis(call)
    dout = dout.astype(v.dtype)
    q_rows, dout_rows, *numbers = (_rows(call, x) for x in (q, dout, *backward_rows(out, lse, dout, dlse)))
    arrays = (q_rows, _turned(q_rows, axis), dout_rows, _turned(dout_rows, axis), *numbers)

    def head(xs):
        steps, k, v, lengths = xs

        def step(carry, xs):
            walk = _Walk(call, xs, lengths)
            q, q_turned, dout, dout_turned, lse, delta = xs[0]

            def meet(blocks: jax.Array, keys: jax.Array, carry):
                dq, dk, dv = carry
                near, values = _panel(k, blocks, 1 - axis), _panel(v, blocks, 1 - axis)
                product, dweight = dot(q_turned, near, axis, axis), dot(dout_turned, values, axis, axis)
                pair = panel.weights(walk.rows, product, keys, dweight, lse, delta)
                weight, dscore = (x.astype(q.dtype) for x in pair)
                dk = _scatter(dk, dot(q, dscore, 0, 0), blocks)
                dv = _scatter(dv, dot(dout, weight, 0, 0), blocks)
                return dq + dot(dscore, near, 1, 1 - axis), dk, dv

            dq, dk, dv = walk.over_panels(meet, (jnp.zeros(q.shape, jnp.float32), *carry))
            return (dk, dv), (dq * flash.rules.scale).astype(q.dtype)

        zeros = tuple(jnp.zeros((call.k_blocks, size, call.block_k)) for size in (flash.dim, flash.value_dim))
        (dk, dv), dq = lax.scan(step, zeros, steps)
        return dq, (dk * flash.rules.scale).swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype)

    steps = (arrays, *_lists(call, indices, counts), _slopes(call, slopes))
    keys = (_turned(_keys(call, x), axis) for x in (k, v))
    dq, dk, dv = lax.map(head, (steps, *keys, _lengths(call, q_lengths, kv_lengths)))
    return _heads(call, dq), dk.reshape(k.shape), dv.reshape(v.shape)


def together(call: Call, counts: np.ndarray) -> tuple[int, bool]:
    """How many blocks of rows take a step together, given lists that are known, and whether their lists differ.

    As many as fill a panel without more than a tenth of padding. A list is padded with its own last block, so an empty
    one shares no step with others.
    """
    most = PANEL_SCORES // (_widest(call) * call.rows * call.block_k)
    for size in (8, 4, 2):
        if size > most or call.q_blocks % size:
            continue
        groups = counts.reshape(-1, size)
        longest, shortest = groups.max(1), groups.min(1)
        if longest.sum() * size <= WASTE * counts.sum() and not np.any((shortest == 0) & (longest > 0)):
            return size, bool(np.any(longest > shortest))
    return 1, False


def _widest(call: Call) -> int:
    """Blocks of the widest panel: a power of two."""
    width = 1
    while 2 * width * call.rows * call.block_k <= PANEL_SCORES and 2 * width <= min(call.listed, PANEL_BLOCKS):
        width *= 2
    return width


class _Walk:
    """The walk of a step's blocks of rows over their lists; `shape` of their rows."""

    def __init__(self, call: Call, xs, lengths):
        _, number, self.order, self.count, slope = xs
        self.call, self.shape = call, (call.together, call.rows)
        within = jnp.tile(lax.iota(jnp.int32, call.block_q), call.share)
        if slope is not None:
            slope = jnp.repeat(slope, call.block_q, 1)[..., None]
        numbers = (number[:, None] * call.block_q + within)[..., None]
        self.rows = panel.Rows(call.flash, numbers, lengths, slope, padded=call.uneven)

    def over_panels(self, meet: Callable[[jax.Array, jax.Array, Any], Any], carry: Any) -> Any:
        """`meet(blocks i32[blocks of rows, n], their keys, carry)` over the lists, the widest panels first."""
        at, left, width = jnp.zeros((), jnp.int32), self.count.max(), _widest(self.call)
        while width:
            turns = left // width

            def turn(j, carry, at=at, width=width):
                start = at + j * width
                blocks = lax.dynamic_slice_in_dim(self.order, start, width, 1)
                return meet(blocks, self._keys(blocks, start), carry)

            carry = lax.fori_loop(0, turns, turn, carry)
            at, left, width = at + turns * width, left - turns * width, width // 2
        return carry

    def _keys(self, blocks: jax.Array, start: jax.Array) -> jax.Array:
        """The key numbers of a panel, i32[blocks of rows, 1, keys]; behind all keys where a list has ended."""
        if self.call.uneven:
            live = start + jnp.arange(blocks.shape[1]) < self.count[:, None]
            blocks = jnp.where(live, blocks, self.call.k_blocks)
        keys = blocks[..., None] * self.call.block_k + lax.iota(jnp.int32, self.call.block_k)
        return keys.reshape(len(blocks), 1, -1)


def _panel(x: jax.Array, blocks: jax.Array, axis: int) -> jax.Array:
    """Listed blocks of `x[k_blocks, ...]` joined along their axis 0 or 1, for each block of rows."""
    # Slices and a concatenation copy whole rows; a gather goes an element at a time.
    found = [[lax.dynamic_index_in_dim(x, number, keepdims=False) for number in row] for row in blocks]
    return jnp.stack([jnp.concatenate(row, axis) for row in found])


def _scatter(total: jax.Array, part: jax.Array, blocks: jax.Array) -> jax.Array:
    """Add panels' columns `part[blocks of rows, size, keys]` to their blocks in `total[k_blocks, size, block_k]`."""
    size, width = total.shape[1:]
    every = blocks.shape[1]

    # A loop: in straight line XLA fuses one update with the next one's read, and copies the total in between.
    def add(i, total):
        row, j = i // every, i % every
        new = lax.dynamic_slice(part, (row, 0, j * width), (1, size, width))[0]
        old = lax.dynamic_index_in_dim(total, blocks[row, j], keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + new, blocks[row, j], 0)

    return lax.fori_loop(0, blocks.size, add, total)


def _rows(call: Call, x: jax.Array) -> jax.Array:
    """`[B, H, T, ...]` as the steps of each key head: `[B G, steps, blocks of rows, rows, ...]`."""
    x = x.reshape(-1, call.flash.group // call.share, call.share, call.q_blocks, call.block_q, *x.shape[3:])
    return x.swapaxes(2, 3).reshape(len(x), -1, call.together, call.rows, *x.shape[5:])


def _heads(call: Call, x: jax.Array) -> jax.Array:
    """The inverse of `_rows`."""
    rest = x.shape[4:]
    x = x.reshape(len(x), -1, call.q_blocks, call.share, call.block_q, *rest).swapaxes(2, 3)
    return x.reshape(call.flash.batch, call.flash.heads, call.flash.queries, *rest)


def _axis(call: Call) -> int:
    """The axis that queries and keys are multiplied over: 1, or 0 where they are kept turned round.

    Several small products at once are a fifth faster so; of a large one the copies that make its panel cost more.
    """
    return 0 if call.together > 1 else 1


def _turned(x: jax.Array, axis: int) -> jax.Array:
    """Blocks turned round for axis 0. Before the loops: within, XLA would fold it into the product it is made for."""
    return x if axis else x.swapaxes(-1, -2)


def _keys(call: Call, x: jax.Array) -> jax.Array:
    """`[B, G, S, size]` as `[B G, k_blocks, block_k, size]`."""
    return x.reshape(-1, call.k_blocks, call.block_k, x.shape[-1])


def _lists(call: Call, indices: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Number, list and count of each of `_rows`' blocks: i32[B G, steps, blocks of rows, ...]."""
    flash = call.flash
    if call.uneven:  # beyond its end a list names its last block
        at = jnp.minimum(jnp.arange(call.listed), jnp.maximum(counts - 1, 0)[..., None])
        indices = jnp.take_along_axis(indices, at, -1)
    heads = flash.kv_heads if call.share > 1 else flash.heads
    number = jnp.broadcast_to(jnp.arange(call.q_blocks), (flash.batch, heads, call.q_blocks))
    every = (jnp.broadcast_to(x, (flash.batch, heads, *x.shape[2:])) for x in (indices, counts))
    shape = (flash.batch * flash.kv_heads, -1, call.together)
    number, order, count = (x.reshape(*shape, *x.shape[3:]) for x in (number, *every))
    return number, order, count


def _slopes(call: Call, slopes: jax.Array | None) -> jax.Array | None:
    """The slopes of the heads in each of `_rows`' blocks: f32[B G, steps, blocks of rows, share]."""
    if slopes is None:
        return None
    flash = call.flash
    each = slopes.reshape(1, flash.kv_heads, -1, 1, call.share)
    each = jnp.broadcast_to(each, (flash.batch, *each.shape[1:3], call.q_blocks, call.share))
    return each.reshape(flash.batch * flash.kv_heads, -1, call.together, call.share)


def _lengths(call: Call, q_lengths, kv_lengths) -> tuple[jax.Array, jax.Array] | None:
    """Both lengths for each of `[B G]`, or None where all rows are whole."""
    if not call.flash.ragged:
        return None
    return jnp.repeat(q_lengths, call.flash.kv_heads), jnp.repeat(kv_lengths, call.flash.kv_heads)
