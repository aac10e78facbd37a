"""Argmax and sampling over a vocabulary: few passes, and never a token of zero weight.

Stability: internal.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxinfer.decode import keys as key_streams


def first_max(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum over the last axis and the lowest index that has it: `f32[...], i32[...]`.

    Two plain reductions, which XLA's CPU backend vectorizes; its argmax takes two to four times as long. Where the
    maximum is NaN the index is the last one.
    """
    peak = x.max(-1)
    return peak, _first(x == peak[..., None])


def pick(weights: jax.Array, u: jax.Array) -> jax.Array:
    """The index i with probability `weights[..., i] / sum`, by inverse CDF of `u[...]` in [0, 1).

    A cumulative sum in floats need not be monotone nor end at the total, so only indices of positive weight are
    candidates, and where none is reached the heaviest one is taken.
    """
    cumulative = jnp.cumsum(weights, -1)
    hit = (cumulative > (u * cumulative[..., -1])[..., None]) & (weights > 0)
    return jnp.where(hit.any(-1), _first(hit), first_max(weights)[1])


def draw(weights: jax.Array, keys: jax.Array) -> jax.Array:
    """A sample of each row of `weights f32[B, V]` (not normalised, not all zero) under `keys[B]`: i32[B].

    Two levels: a block of about sqrt(V) entries by the blocks' sums, then an entry of it, each with its own uniform.
    That costs two passes over V, and the smallest probability that can be drawn is far below 2**-24.
    """
    batch, vocab = weights.shape
    width = 2 ** math.ceil(math.log2(max(vocab, 1)) / 2)
    blocks = -(-vocab // width)
    grid = jnp.pad(weights, ((0, 0), (0, blocks * width - vocab))).reshape(batch, blocks, width)
    u = key_streams.uniforms(keys, 2)
    block = pick(grid.sum(-1), u[:, 0])
    chosen = jnp.take_along_axis(grid, block[:, None, None], 1)[:, 0]
    return jnp.minimum(block * width + pick(chosen, u[:, 1]), vocab - 1)


def _first(hit: jax.Array) -> jax.Array:
    n = hit.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, hit.shape, hit.ndim - 1)
    return jnp.where(hit, index, n - 1).min(-1)
