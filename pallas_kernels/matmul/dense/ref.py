"""The oracles: the products in float32, written out.

Stability: internal.
"""

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.dense.call import Call


def dense_ref(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[K, N] -> [..., N]` as a sum of float32 products."""
    return (x.astype(jnp.float32)[..., None] * w.astype(jnp.float32)).sum(-2).astype(x.dtype)


def transposed_ref(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[N, K].T -> [..., N]` as a sum of float32 products."""
    return dense_ref(call, x, w.T)
