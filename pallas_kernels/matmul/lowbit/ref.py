"""Weight-only product, the oracle: dequantize the whole weight in float32, then multiply.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.weight import LowBit, dequantize


def lowbit_ref(x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]`, weight of N outputs -> `f32[M, N]`."""
    return jnp.matmul(x.astype(jnp.float32), dequantize(w).T, precision="highest")
