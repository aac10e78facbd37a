"""Gated linear attention in XLA: chunks as matrix products, a state between them; runs anywhere, fast on CPU.

Yang et al., 2023 (arXiv 2312.06635), with the secondary chunking replaced by the levels of gla/levels.py. Levels below
TILE share products of TILE tokens, masked to their pairs (small products cost more than wasted ones); the levels above
multiply halves. Of a chunk whose size is no power of two the levels see the next one, zeros behind its tokens.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.linear import chunked
from jaxinfer.pallas_kernels.linear.arguments import padded, power_of_two_up_to
from jaxinfer.pallas_kernels.linear.chunked import Decays, Rule, Sizes, product
from jaxinfer.pallas_kernels.linear.gla.levels import from_halves, halves, levels, pairs, second

Array = jax.Array
CHUNK = 64
GROUP = 4  # chunks worked on at a time
TILE = 16


def forward(
    q: Array, k: Array, v: Array, log_gate: Array, state: Array, *, scale: float, block: int | None
) -> tuple[Array, Array]:
    """out [B, H, T, V] and state f32 [B, H, K, V]."""
    length = q.shape[2]
    sizes = _sizes(length, block)
    q, k, v, log_gate = (padded(x, sizes.tokens) for x in (q, k, v, log_gate))
    out, state = chunked.forward(_rule(log_gate, sizes, scale), q, k, v, state, sizes)
    return out[:, :, :length], state


def backward(
    q: Array, k: Array, v: Array, log_gate: Array, state: Array, d_out: Array, d_state: Array,
    *, scale: float, block: int | None,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """Gradients of q, k, v, log_gate (each in its dtype) and state, from those of the two outputs."""
    length = q.shape[2]
    sizes = _sizes(length, block)
    q, k, v, log_gate, d_out = (padded(x, sizes.tokens) for x in (q, k, v, log_gate, d_out))
    rule = _rule(log_gate, sizes, scale)
    dq, dk, dv, d_first, d_gate = chunked.backward(rule, q, k, v, state, d_out, d_state, sizes, log_gate)
    dq, dk, dv, d_gate = (x[:, :, :length] for x in (dq, dk, dv, d_gate))
    return dq, dk, dv, d_gate, d_first


def _sizes(length: int, block: int | None) -> Sizes:
    chunk = block or power_of_two_up_to(length, CHUNK)
    return Sizes.of(length, chunk, GROUP, rows=power_of_two_up_to(chunk, chunk * 2))


def _rule(log_gate: Array, sizes: Sizes, scale: float) -> Rule:
    """`gate` is the decays of a group, f32 [B, H, G, C, K]."""
    chunk = sizes.rows
    later = jnp.asarray(np.triu(np.ones((chunk, chunk), np.float32)))

    def decays(gate: Array) -> Decays:
        *_, (_, into, out) = levels(gate, chunk)
        return Decays(scale * into, out, into[..., -1, :, None])

    def gate_grad(gate: Array, x: Array, boundary: Array) -> Array:
        # A gate scales what crosses it: all that later tokens read and earlier ones did not write, and the new state.
        sums = jnp.einsum("ts,bhgsk->bhgtk", later, x, precision="highest")
        return sums + boundary[..., None, :]

    return Rule(
        lambda i: jnp.exp(sizes.cut(log_gate, i).astype(jnp.float32)),
        decays,
        lambda q, k, v, gate: scale * _inside(q, k, v, gate),
        lambda q, k, v, gate, d_out: _inside_grad(q, k, v, gate, d_out, scale),
        gate_grad,
    )


def _inside(q: Array, k: Array, v: Array, gate: Array) -> Array:
    chunk, tile = q.shape[-2], min(TILE, q.shape[-2])
    out = jnp.zeros(v.shape, jnp.float32)
    scores = _tile_scores(q, k, gate, tile)
    out += product(scores.astype(v.dtype), _tiles(v, tile), 1, 0).reshape(v.shape)
    for h, prefix, suffix in _upper(gate, tile, chunk):
        q2, k1, v1 = halves(q * prefix, h)[1], halves(k * suffix, h)[0], halves(v, h)[0]
        scores = product(q2.astype(q.dtype), k1.astype(k.dtype), 1, 1).astype(v.dtype)
        seen = product(scores, v1, 1, 0)
        out += from_halves(jnp.zeros_like(seen), seen)
    return out


def _inside_grad(q: Array, k: Array, v: Array, gate: Array, d_out: Array, scale: float) -> tuple[Array, Array, Array]:
    chunk, tile = q.shape[-2], min(TILE, q.shape[-2])
    d_tiles, v_tiles = _tiles(d_out, tile), _tiles(v, tile)
    scores = (scale * _tile_scores(q, k, gate, tile)).astype(v.dtype)
    dv = product(scores, d_tiles, 0, 0).reshape(v.shape)
    d_scores = scale * product(d_tiles, v_tiles, 1, 1)
    diagonal = jnp.diagonal(d_scores, axis1=-2, axis2=-1).reshape(*q.shape[:-1], 1)
    dq, dk = diagonal * k, diagonal * q
    for h, prefix, suffix, q2, k1 in _lower(q, k, gate, tile):
        d_level = jnp.where(pairs(tile, h), d_scores, 0.0).astype(q.dtype)
        dq += product(d_level, k1, 1, 0).reshape(q.shape) * prefix
        dk += product(d_level, q2, 0, 0).reshape(k.shape) * suffix
    for h, prefix, suffix in _upper(gate, tile, chunk):
        (p1, p2), (s1, s2) = halves(prefix, h), halves(suffix, h)
        q2, k1 = (halves(q, h)[1] * p2).astype(q.dtype), (halves(k, h)[0] * s1).astype(k.dtype)
        v1, d2 = halves(v, h)[0], halves(d_out, h)[1]
        scores = (scale * product(q2, k1, 1, 1)).astype(v.dtype)
        d_level = (scale * product(d2, v1, 1, 1)).astype(q.dtype)
        dq += from_halves(jnp.zeros_like(p1), product(d_level, k1, 1, 0) * p2)
        dk += from_halves(product(d_level, q2, 0, 0) * s1, jnp.zeros_like(s2))
        dv_level = product(scores, d2, 0, 0)
        dv += from_halves(dv_level, jnp.zeros_like(dv_level))
    return dq, dk, dv


def _tile_scores(q: Array, k: Array, gate: Array, tile: int) -> Array:
    """f32 [.., C / tile, tile, tile]: scores among the tokens of each tile, the diagonal included, unscaled."""
    scores = jnp.where(np.eye(tile, dtype=bool), product(_tiles(q, tile), _tiles(k, tile), 1, 1), 0.0)
    for h, _, _, q2, k1 in _lower(q, k, gate, tile):
        scores += jnp.where(pairs(tile, h), product(q2, k1, 1, 1), 0.0)
    return scores


def _lower(q: Array, k: Array, gate: Array, tile: int) -> Iterator[tuple[int, Array, Array, Array, Array]]:
    """Levels below a tile: (h, prefix, suffix, decayed second halves of q, decayed first halves of k, in tiles)."""
    for h, prefix, suffix in levels(gate, tile):
        if h < tile:
            late = second(q.shape[-2], h)
            q2 = jnp.where(late, q * prefix, 0.0).astype(q.dtype)
            k1 = jnp.where(late, 0.0, k * suffix).astype(k.dtype)
            yield h, prefix, suffix, _tiles(q2, tile), _tiles(k1, tile)


def _upper(gate: Array, tile: int, chunk: int) -> Iterator[tuple[int, Array, Array]]:
    return ((h, prefix, suffix) for h, prefix, suffix in levels(gate, chunk) if tile <= h < chunk)


def _tiles(x: Array, tile: int) -> Array:
    return x.reshape(*x.shape[:-2], -1, tile, x.shape[-1])
