"""The oracle of tree: cache and nodes side by side, one explicit boolean mask, one softmax.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.decode.codes import Codes, numbers


def attend(q, k, v, node_k, node_v, visible, lengths, depths, slopes, options):
    """As `tree`, with `visible bool[B, N, N]` for ancestors and `depths i32[B, N]`."""
    scale, window, softcap = options.scale, options.window, options.softcap
    k = numbers(k, -2 if options.transposed else -1) if isinstance(k, Codes) else k
    v = numbers(v) if isinstance(v, Codes) else v
    k = jnp.swapaxes(k, 2, 3) if options.transposed else k
    repeat, capacity = q.shape[1] // k.shape[1], k.shape[2]
    k, v = (
        jnp.repeat(jnp.concatenate([x, y], 2).astype(jnp.float32), repeat, 1) for x, y in ((k, node_k), (v, node_v))
    )
    score = jnp.einsum("bhtd,bhcd->bhtc", q.astype(jnp.float32), k, precision="highest") * scale
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    positions = lengths[:, None] + depths
    slots = jnp.broadcast_to(jnp.arange(capacity), (len(lengths), capacity))
    distance = positions[:, :, None] - jnp.concatenate([slots, positions], 1)[:, None]
    if slopes is not None:
        score -= slopes[:, None, None] * distance[:, None]
    cached = (slots < lengths[:, None])[:, None] & (depths >= 0)[:, :, None]
    seen = jnp.concatenate([cached, visible], 2)
    if window is not None:
        seen &= distance < window
    score = jnp.where(seen[:, None], score, -jnp.inf)
    lse = jax.nn.logsumexp(score, -1)
    weight = jnp.where(seen[:, None], jnp.exp(score - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]), 0.0)
    return jnp.einsum("bhtc,bhcd->bhtd", weight, v, precision="highest").astype(q.dtype), lse
