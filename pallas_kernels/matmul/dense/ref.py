"""The oracle: the product in float32, written out.

Stability: internal.
"""

import jax
import jax.numpy as jnp


def dense_ref(call: tuple, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[K, N] -> [..., N]` as a sum of float32 products."""
    return (x.astype(jnp.float32)[..., None] * w.astype(jnp.float32)).sum(-2).astype(x.dtype)
