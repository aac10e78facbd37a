"""Gated linear attention, naive: the recurrence token by token in float32, and its parallel form; the oracle of tests.

Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, 2023 (arXiv 2312.06635).

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def recurrent(q: Array, k: Array, v: Array, log_gate: Array, state: Array, *, scale: float) -> tuple[Array, Array]:
    """out [B, H, T, V] and state f32 [B, H, K, V] by S = diag(exp(log_gate)) S + k v^T, o = scale q S."""

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, gate = token
        state = jnp.exp(gate)[..., None] * state + k[..., None] * v[..., None, :]
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

    tokens = tuple(jnp.moveaxis(x.astype(jnp.float32), 2, 0) for x in (q, k, v, log_gate))
    state, out = lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 2).astype(q.dtype), state


def parallel(q: Array, k: Array, v: Array, log_gate: Array, *, scale: float) -> Array:
    """out [B, H, T, V] with scores_ij = scale sum_d q_id k_jd exp(b_id - b_jd), b the gates' running sum; no state.

    Takes T T K numbers a head. Only differences b_i - b_j with i >= j are exponentiated, and they are at most 0.
    """
    q, k, v32, gate = (x.astype(jnp.float32) for x in (q, k, v, log_gate))
    sums = jnp.cumsum(gate, 2)
    seen = jnp.tril(jnp.ones((q.shape[2],) * 2, bool))[..., None]
    decay = jnp.exp(jnp.where(seen, sums[:, :, :, None] - sums[:, :, None], -jnp.inf))
    scores = scale * jnp.einsum("bhik,bhjk,bhijk->bhij", q, k, decay, precision="highest")
    return jnp.einsum("bhij,bhjv->bhiv", scores, v32, precision="highest").astype(v.dtype)
