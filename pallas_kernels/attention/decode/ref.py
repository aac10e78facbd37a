"""The oracle of decode: every score in float32, an explicit mask, one softmax.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.decode.call import Call
from jaxinfer.pallas_kernels.attention.decode.codes import Codes, numbers


def attend(call: Call, q, k, v, lengths, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """As `decode`: every query head with its own copy of its key head."""
    k = numbers(k, -2 if call.transposed else -1) if isinstance(k, Codes) else k
    v = numbers(v) if isinstance(v, Codes) else v
    k = jnp.swapaxes(k, 2, 3) if call.transposed else k
    k, v = (jnp.repeat(x.astype(jnp.float32), call.repeat, axis=1) for x in (k, v))
    score = jnp.einsum("bhtd,bhcd->bhtc", q.astype(jnp.float32), k, precision="highest") * call.scale
    if call.softcap is not None:
        score = call.softcap * jnp.tanh(score / call.softcap)
    distance = positions[:, None, :, None] - jnp.arange(call.capacity)
    if slopes is not None:
        score -= slopes[None, :, None, None] * distance
    seen = (distance >= 0) & (jnp.arange(call.capacity) < lengths[:, None, None, None])
    if call.window is not None:
        seen &= distance < call.window
    score = jnp.where(seen, score, -jnp.inf)
    lse = jax.nn.logsumexp(score, axis=-1)
    weight = jnp.where(seen, jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    return jnp.einsum("bhtc,bhcd->bhtd", weight, v, precision="highest").astype(q.dtype), lse
