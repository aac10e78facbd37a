"""FlashAttention-2 in XLA: the fast path on CPU, and what runs on any machine.

Dao (2023), arXiv 2307.08691. A block of query rows meets panels of keys under a running softmax, and only the panels
that it can see: a panel is 4, 2 or 1 key blocks, as many as remain, because XLA's CPU products are twice as fast on
wide panels, and since a while loop of no or one turn, unlike a conditional, keeps both cores at work. Memory is linear
in the lengths. The backward pass keeps the gradients of keys and values transposed, so that every product reads its
operands in the order in which they lie (a quarter of the time, measured).

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels._core import tuning
from jaxinfer.pallas_kernels.attention.flash import panel
from jaxinfer.pallas_kernels.attention.flash.call import Call, cdiv
from jaxinfer.pallas_kernels.attention.flash.panel import dot
from jaxinfer.pallas_kernels.attention.flash.scores import backward_rows, finish

PANELS = (4, 2, 1)  # key blocks of a panel, the widest first; the last is 1


def forward(call: Call, q, k, v, q_lengths, kv_lengths, slopes) -> tuple[jax.Array, jax.Array]:
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    block_q, block_k = blocks(call)
    rows = _rows(call, q, block_q)

    def head(xs):
        rows, k, v, slopes, lengths = xs

        def block(xs):
            i, q, slope = xs
            tile = _Tile(call, i * block_q, block_q, block_k, lengths, slope)

            def step(start: jax.Array, width: int, carry):
                keys, values = (lax.dynamic_slice_in_dim(x, start, width) for x in (k, v))
                score = tile.rows.scores(dot(q, keys, 1, 1), _numbered(start, width))
                return panel.attend(carry, score, values)

            peak, total, acc = tile.over_panels(step, panel.start((block_q,), call.value_dim))
            return finish(peak, total, acc, q.dtype)

        return lax.map(block, (_numbers(call, block_q), rows, slopes))

    padded = (_pad(x, 2, block_k).reshape(-1, cdiv(call.keys, block_k) * block_k, x.shape[-1]) for x in (k, v))
    out, lse = lax.map(head, (rows, *padded, _slopes(call, slopes, block_q), _lengths(call, q_lengths, kv_lengths)))
    out = out.reshape(call.batch, call.heads, -1, call.value_dim)
    return out[:, :, : call.queries], lse.reshape(call.batch, call.heads, -1)[:, :, : call.queries]


def backward(
    call: Call, q, k, v, q_lengths, kv_lengths, slopes, out, lse, dout, dlse
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(dq, dk, dv)` from the results and their cotangents; weights are computed again, from the log-sum-exp."""
    block_q, block_k = blocks(call)
    keys = cdiv(call.keys, block_k) * block_k
    lse, delta = backward_rows(out, lse, dout, dlse)
    rows = tuple(_rows(call, x, block_q) for x in (q, dout.astype(v.dtype), lse, delta))

    def head(xs):
        rows, k, v, slopes, lengths = xs

        def block(carry, xs):
            i, (q, dout, lse, delta), slope = xs
            tile = _Tile(call, i * block_q, block_q, block_k, lengths, slope)

            def step(start: jax.Array, width: int, carry):
                dq, dk, dv = carry
                keys, values = (lax.dynamic_slice_in_dim(x, start, width) for x in (k, v))
                product, dweight = dot(q, keys, 1, 1), dot(dout, values, 1, 1)
                pair = panel.weights(tile.rows, product, _numbered(start, width), dweight, lse, delta)
                weight, dscore = (x.astype(q.dtype) for x in pair)
                dk = _add(dk, dot(q, dscore, 0, 0), start)
                dv = _add(dv, dot(dout, weight, 0, 0), start)
                return dq + dot(dscore, keys, 1, 0), dk, dv

            dq, dk, dv = tile.over_panels(step, (jnp.zeros(q.shape, jnp.float32), *carry))
            return (dk, dv), (dq * call.rules.scale).astype(q.dtype)

        zeros = (jnp.zeros((call.dim, keys)), jnp.zeros((call.value_dim, keys)))
        (dk, dv), dq = lax.scan(block, zeros, (_numbers(call, block_q), rows, slopes))
        return dq, (dk * call.rules.scale).T.astype(k.dtype), dv.T.astype(v.dtype)

    padded = (_pad(x, 2, block_k).reshape(-1, keys, x.shape[-1]) for x in (k, v))
    dq, dk, dv = lax.map(head, (rows, *padded, _slopes(call, slopes, block_q), _lengths(call, q_lengths, kv_lengths)))
    dq = dq.reshape(call.batch, call.heads, -1, call.dim)[:, :, : call.queries]
    dk, dv = (x.reshape(call.batch, call.kv_heads, keys, -1)[:, :, : call.keys] for x in (dk, dv))
    return dq, dk, dv


def blocks(call: Call) -> tuple[int, int]:
    """Rows of queries and of keys of a block: the caller's, the table's, or by this rule, no more than there are."""

    def rule() -> tuple[int, int]:
        # A window's edges are computed in whole blocks, so blocks far wider than the window would be mostly waste.
        return (512, 256) if call.rules.window is None or call.rules.window >= 1024 else (256, 128)

    block_q, block_k = call.block or tuning.block("flash", call.dtype, call.sizes, rule, device="cpu")
    return min(block_q, cdiv(call.queries, 8) * 8), min(block_k, cdiv(call.keys, 8) * 8)


class _Tile:
    """One block of query rows of one head: which keys it sees, in key blocks."""

    def __init__(self, call: Call, first: jax.Array, block_q: int, block_k: int, lengths, slope):
        self.call, self.block_k = call, block_k
        numbers = first + lax.iota(jnp.int32, block_q)[:, None]
        self.rows = panel.Rows(call, numbers, lengths, slope, padded=call.keys % block_k > 0)
        offset = self.rows.kv_length - self.rows.q_length
        low = jnp.maximum(call.rules.first_key(first + offset), 0) // block_k
        end = cdiv(call.rules.end_key(first + offset + block_q - 1, self.rows.kv_length), block_k)
        self.low, self.count = low, jnp.where(first < self.rows.q_length, jnp.maximum(end - low, 0), 0)

    def over_panels(self, step: Callable[[jax.Array, int, Any], Any], carry: Any) -> Any:
        """`step(first key, keys, carry)` over all panels that the block sees, the widest first."""
        at, left = self.low, self.count
        for width in PANELS:
            if width > cdiv(self.call.keys, self.block_k):
                continue  # a panel wider than the whole
            turns = left // width

            def turn(j, carry, at=at, width=width):
                return step((at + j * width) * self.block_k, width * self.block_k, carry)

            carry = lax.fori_loop(0, turns, turn, carry)
            at, left = at + turns * width, left - turns * width
        return carry


def _numbered(start: jax.Array, width: int) -> jax.Array:
    """The numbers of a panel's keys, i32[1, width]."""
    return start + lax.iota(jnp.int32, width)[None]


def _add(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Add to the columns of `total` from `start` on."""
    old = lax.dynamic_slice_in_dim(total, start, part.shape[1], 1)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, 1)


def _pad(x: jax.Array, axis: int, block: int) -> jax.Array:
    extra = -x.shape[axis] % block
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x


def _rows(call: Call, x: jax.Array, block_q: int) -> jax.Array:
    """`[B, H, T, ...]` as the blocks that read each key head: `[B G, blocks, block_q, ...]`."""
    return _pad(x, 2, block_q).reshape(
        call.batch * call.kv_heads, call.group * cdiv(call.queries, block_q), block_q, *x.shape[3:]
    )


def _numbers(call: Call, block_q: int) -> jax.Array:
    """The number of each of `_rows`' blocks within its own head."""
    return jnp.tile(jnp.arange(cdiv(call.queries, block_q)), call.group)


def _slopes(call: Call, slopes: jax.Array | None, block_q: int) -> jax.Array | None:
    """The slope of each of `_rows`' blocks, f32[B G, blocks]."""
    if slopes is None:
        return None
    each = jnp.repeat(slopes.reshape(call.kv_heads, call.group), cdiv(call.queries, block_q), 1)
    return jnp.tile(each, (call.batch, 1))


def _lengths(call: Call, q_lengths, kv_lengths) -> tuple[jax.Array, jax.Array] | None:
    """Both lengths for each of `[B G]`, or None where all rows are whole."""
    return (jnp.repeat(q_lengths, call.kv_heads), jnp.repeat(kv_lengths, call.kv_heads)) if call.ragged else None
