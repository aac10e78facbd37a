"""float8 by float8 where a whole row is one sum: XLA's own product, which GPUs with float8 run on their tensor cores.

The int8 product of that kind needs no form of its own: `blocked` is it.

Stability: internal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.matmul.acts8.ref import quantize_rows
from jaxinfer.pallas_kernels.matmul.sums8 import BY_ROWS
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales


def refuses(call: Any) -> str | None:
    """Why XLA's product cannot serve a call, or None."""
    if call.activations == "int8":
        return 'it multiplies float8; int8 has "blocked"'
    if call.groups > 1:
        return f"it sums whole rows, the weight has {call.groups} groups"
    return None


def product(call: Any, x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]` float, float8 weight of N outputs and one group -> `x.dtype[M, N]`."""
    xq, sx = quantize_rows(x, 1, call.activations)
    sums = lax.dot_general(xq, w.codes, BY_ROWS, preferred_element_type=jnp.float32)
    return (sums * float_scales(w).T * sx).astype(x.dtype)
