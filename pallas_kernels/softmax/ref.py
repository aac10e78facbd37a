"""Softmax, naive: subtract the maximum, exponentiate, divide, in float32; the oracle of tests.

The usual three passes, which the Two-Pass Softmax (Dukhan & Ablavatski, 2020, arXiv 2001.04438) replaces.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.softmax.pair import LIMIT

Array = jax.Array


def softmax(x: Array) -> Array:
    """Softmax over the last axis; a row of nothing but -inf gives zeros, and what is beyond LIMIT counts as LIMIT."""
    wide = x.astype(jnp.float32)
    wide = jnp.where(wide == -jnp.inf, wide, jnp.clip(wide, -LIMIT, LIMIT))
    top = wide.max(-1, keepdims=True)
    weights = jnp.exp(wide - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), weights * total).astype(x.dtype)
