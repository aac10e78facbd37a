"""Random keys: a row's draws depend on its own identity and length, never on its neighbours or its place in a batch.

`row_key` comes from (seed, row id, sample index). A step folds in the row's length, then the stream (what the draw is
for), then the slot. No key is carried or split, so no order of work can reuse or shift one. A nested loop takes the
outer step's DRAFT stream as its row key.

Stability: experimental.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
    """What a draw is for; each has its own keys."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    BONUS = 3


def row_keys(key: jax.Array, row_ids: jax.Array, sample: jax.Array | int = 0) -> jax.Array:
    """Keys of rows `row_ids i32[B]` under the job's `key`, for sample index `sample` (a number or `i32[B]`)."""
    return _fold(_fold(jnp.broadcast_to(key, row_ids.shape), row_ids), jnp.broadcast_to(sample, row_ids.shape))


def step_keys(row_key: jax.Array, length: jax.Array) -> jax.Array:
    """Keys of one step: `row_key[B]` folded with `length i32[B]`."""
    return _fold(row_key, length)


def stream(step_key: jax.Array, which: jax.Array | int) -> jax.Array:
    """Keys of one stream of a step; `which` is a `Stream` or an `i32[B]` of them."""
    return _fold(step_key, jnp.broadcast_to(jnp.asarray(which, jnp.int32), step_key.shape))


def slot(stream_key: jax.Array, index: jax.Array | int) -> jax.Array:
    """The key of one slot for each row; `index` is a number or `i32[B]`."""
    return _fold(stream_key, jnp.broadcast_to(jnp.asarray(index, jnp.int32), stream_key.shape))


def slots(stream_key: jax.Array, n: int) -> jax.Array:
    """The keys of slots 0 to n - 1: `key[B, n]`."""
    return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n)))(stream_key)


def uniforms(keys: jax.Array, n: int | None = None) -> jax.Array:
    """One uniform in [0, 1) for each key, or `n` of them on a last axis."""

    def one(key):
        return jax.random.uniform(key, () if n is None else (n,))

    for _ in keys.shape:
        one = jax.vmap(one)
    return one(keys)


def _fold(keys: jax.Array, data: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in)(keys, data)
