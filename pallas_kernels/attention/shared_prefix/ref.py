"""The oracle of shared_prefix: every row with its own copy of its path's prefixes and its suffix, one softmax.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.decode.call import Call


def attend(call: Call, q, k, v, lengths, paths, starts, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """Attention of the rows to the prefixes on their paths alone; the tokens of a path's level stand at its start."""
    rows, levels = paths.shape
    k = jnp.swapaxes(k, 2, 3) if call.transposed else k
    at = starts[:, :, None] + jnp.arange(call.capacity)
    there = (paths >= 0)[:, :, None] & (jnp.arange(call.capacity) < lengths[paths][:, :, None])
    at, there = at.reshape(rows, -1)[:, None, None], there.reshape(rows, -1)[:, None, None]

    def copied(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.astype(jnp.float32)[paths], 1, 2)
        return jnp.repeat(x.reshape(rows, call.groups, levels * call.capacity, call.dim), call.repeat, 1)

    score = jnp.einsum("bhtd,bhcd->bhtc", q.astype(jnp.float32), copied(k), precision="highest") * call.scale
    if call.softcap is not None:
        score = call.softcap * jnp.tanh(score / call.softcap)
    distance = positions[:, None, :, None] - at
    if slopes is not None:
        score -= slopes[:, None, None] * distance
    seen = there & (distance >= 0)
    if call.window is not None:
        seen &= distance < call.window
    score = jnp.where(seen, score, -jnp.inf)
    lse = jax.nn.logsumexp(score, -1)
    weight = jnp.where(seen, jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    return jnp.einsum("bhtc,bhcd->bhtd", weight, copied(v), precision="highest").astype(q.dtype), lse
