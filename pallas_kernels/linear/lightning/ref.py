"""Lightning attention, naive: the recurrence token by token in float32, and its parallel form; the oracle of tests.

Qin et al., Lightning Attention-2, 2024 (arXiv 2401.04658).

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def recurrent(
    q: Array, k: Array, v: Array, log_decay: Array, lengths: Array, state: Array, *, scale: float
) -> tuple[Array, Array]:
    """out [B, H, T, V] and state f32 [B, H, K, V] by S = exp(log_decay) S + k v^T, o = scale q S, one token a step."""
    decay = jnp.exp(log_decay)[:, None, None]

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, t = token
        live = (t < lengths)[:, None, None, None]
        state = jnp.where(live, decay * state + k[..., None] * v[..., None, :], state)
        out = scale * jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")
        return state, jnp.where(live[..., 0], out, 0.0)

    tokens = [jnp.moveaxis(x.astype(jnp.float32), 2, 0) for x in (q, k, v)]
    state, out = lax.scan(step, state, (*tokens, jnp.arange(q.shape[2])))
    return jnp.moveaxis(out, 0, 2).astype(q.dtype), state


def parallel(q: Array, k: Array, v: Array, log_decay: Array, *, scale: float) -> Array:
    """out [B, H, T, V] as ((scale q k^T) * M) v with M_ij = exp(log_decay (i - j)) for i >= j; no initial state."""
    q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    age = jnp.arange(q.shape[2])[:, None] - jnp.arange(q.shape[2])
    weights = jnp.where(age >= 0, jnp.exp(log_decay[:, None, None] * age), 0.0)
    scores = scale * jnp.einsum("bhik,bhjk->bhij", q, k, precision="highest") * weights
    return jnp.einsum("bhij,bhjv->bhiv", scores, v32, precision="highest").astype(v.dtype)
