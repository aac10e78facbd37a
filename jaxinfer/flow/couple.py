"""Couplings that take no work: sources drawn independently of the data, and pairs that were made beforehand.

`pairs` is for reflow (Liu, Gong, Liu 2022, arXiv 2209.03003): x0 and what a trained flow carried it to, as `reflow`
makes them, on which a second training is straighter. A coupling is `(key, x0[B, ...], x1[B, ...], cond) -> (x0, x1,
cond, log_w f32[B])`; the data and their conditions are never moved, sources are, so labels stay with what they name.

Guarantee: independent: exact. reflow: exact in distribution for an exact solver of the first flow, whose error in
marginals it otherwise inherits. State: none. Paper's defaults: one round, pairs from a fine or adaptive solve.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import InputError
from jaxinfer.flow.types import Batch, Solve, VelocityFn


def check(x0: jax.Array, x1: jax.Array) -> None:
    """InputError unless sources and data have one shape [B, ...]."""
    if x0.shape != x1.shape or x0.ndim < 1:
        raise InputError(f"coupling: sources {x0.shape} and data {x1.shape}, accepts one shape [B, ...] for both")


def pairs(key: jax.Array, x0: jax.Array, x1: jax.Array, cond: Any):
    """Row i of the sources with row i of the data, each of weight 1."""
    check(x0, x1)
    return x0, x1, cond, jnp.zeros(x1.shape[0])


def independent(key: jax.Array, x0: jax.Array, x1: jax.Array, cond: Any):
    """Sources shuffled, so that nothing ties them to the data even where they came as pairs; of weight 1."""
    check(x0, x1)
    return jax.random.permutation(key, x0, axis=0), x1, cond, jnp.zeros(x1.shape[0])


def reflow(solve: Solve, velocity: VelocityFn, x0: jax.Array, ts: jax.Array, cond: Any = None) -> Batch:
    """The pairs that `velocity` makes of `x0[B, ...]` by `solve` over the grid `ts`; `cond`: what it was made under."""
    return Batch(solve(velocity, x0, ts, None).x, cond, x0)
