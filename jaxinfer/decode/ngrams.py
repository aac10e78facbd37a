"""Where the last tokens of a row occurred before, and what came after them: what copying drafters look up.

A brute search over the row's own buffer, a comparison a position and token: a few bytes beside a forward's weights,
no table to keep, no hash to collide.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.decode.types import Sequence


def find(seq: Sequence, n: int) -> jax.Array:
    """The first start i32[B] of an earlier occurrence of each row's last `n` tokens, or the buffer's length where there
    is none. The suffix itself does not count, and at least one token follows the occurrence."""
    tokens, size = seq.tokens, seq.tokens.shape[1]
    start = jnp.arange(size, dtype=jnp.int32)[None]
    hit = start + n < seq.length[:, None]
    for i in range(n):
        wanted = seq.token_at(seq.length - n + i)
        ahead = jnp.pad(tokens[:, i:], ((0, 0), (0, i)))
        hit &= ahead == wanted[:, None]
    hit &= (seq.length > n)[:, None]
    return jnp.where(hit, start, size).min(1)


def continuation(seq: Sequence, start: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`count` tokens from `start i32[B]` on and which of them the row has: `i32[B, count]`, `bool[B, count]`."""
    at = start[:, None] + jnp.arange(count, dtype=jnp.int32)
    return jnp.take_along_axis(seq.tokens, at, 1, mode="clip"), at < seq.length[:, None]
