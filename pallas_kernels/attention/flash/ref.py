"""The oracle of `flash`: the whole score matrix in float32, straight from the definition.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.flash.call import Call


def forward(call: Call, q, k, v, q_lengths, kv_lengths, slopes) -> tuple[jax.Array, jax.Array]:
    """`(out[B, H, T, e], lse f32[B, H, T])` by a softmax over all keys; differentiable by jax itself."""
    group = call.heads // call.kv_heads
    k, v = (jnp.repeat(x.astype(jnp.float32), group, 1) for x in (k, v))
    score = jnp.einsum("bhtd,bhsd->bhts", q.astype(jnp.float32), k, precision="highest") * call.rules.scale
    if call.rules.softcap is not None:
        score = call.rules.softcap * jnp.tanh(score / call.rules.softcap)
    seen, distance = visibility(call, q_lengths, kv_lengths)
    if slopes is not None:
        score = score - slopes[:, None, None] * jnp.abs(distance)
    return softmax(score, seen, v, q.dtype)


def visibility(call: Call, q_lengths, kv_lengths) -> tuple[jax.Array, jax.Array]:
    """Who sees whom, bool[B, 1, T, S], and the distance between them, i32[B, 1, T, S]."""
    queries, keys = jnp.arange(call.queries), jnp.arange(call.keys)
    q_lengths = jnp.full(call.batch, call.queries) if q_lengths is None else q_lengths
    kv_lengths = jnp.full(call.batch, call.keys) if kv_lengths is None else kv_lengths
    q_lengths, kv_lengths = (x[:, None, None, None] for x in (q_lengths, kv_lengths))
    distance = queries[:, None] + (kv_lengths - q_lengths) - keys
    seen = (queries[:, None] < q_lengths) & (keys < kv_lengths)
    if call.rules.causal:
        seen &= distance >= 0
    if call.rules.window is not None:
        seen &= jnp.abs(distance) < call.rules.window
    return seen, distance


def softmax(score, seen, v, dtype) -> tuple[jax.Array, jax.Array]:
    """Attention over the scores that are seen; rows without any give zeros and -inf, with zero gradients."""
    score = jnp.where(seen, score, -1e30)
    peak = jax.lax.stop_gradient(score.max(-1, keepdims=True))
    weight = jnp.where(seen, jnp.exp(score - peak), 0.0)
    total = weight.sum(-1)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = jnp.einsum("bhts,bhse->bhte", weight, v, precision="highest") / total[..., None]
    return out.astype(dtype), jnp.where(empty, -jnp.inf, peak[..., 0] + jnp.log(total))
