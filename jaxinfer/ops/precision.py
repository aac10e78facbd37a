"""In what dtype sums are kept: float32 for narrow floats, and float64 where the arrays are that.

So one model is run in bfloat16 for speed and in float64 as an oracle of its own gradients.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sum_dtype(dtype) -> np.dtype:
    """The dtype that sums over values of `dtype` are kept in."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """`x` in `sum_dtype`: float32, or float64 where it is that already."""
    return x.astype(sum_dtype(x.dtype))
