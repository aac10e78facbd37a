"""Products of rounded activations in plain XLA: int8 by int8 into int32 where a whole row is one sum.

On a CPU that product is several times faster than the float one (from two rows on: a single one gets a second of
zeros). Codes below 8 bits are unpacked to int8 a piece at a time, so that no whole copy of the weight exists. Sums of
short groups have no fast integer product in XLA's CPU library, and float8 has none at all: there the rounded
activations go through the float product of `lowbit`, which is the same up to the rounding of float32 sums, and faster.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.acts8.ref import quantize_rows
from jaxinfer.pallas_kernels.matmul.call import Call
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, value
from jaxinfer.pallas_kernels.matmul.lowbit import blocked
from jaxinfer.pallas_kernels.matmul.sums8 import row_sums
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales


def product(call: Call, x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]` float, weight of N outputs -> `x.dtype[M, N]`."""
    per_group = call.per_group and w.groups > 1
    xq, sx = quantize_rows(x, w.groups if per_group else 1, call.activations)
    if w.groups == 1 and call.activations == "int8":
        return _one_sum(xq, sx, w).astype(x.dtype)
    codes = value(xq, ELEMENTS[call.activations])
    if per_group:
        rounded = codes.reshape(*sx.shape, -1) * sx[..., None]
        return blocked.product(rounded.reshape(x.shape), w).astype(x.dtype)
    exact = codes.astype(x.dtype if x.dtype == jnp.bfloat16 else jnp.float32)  # 8 bits: no rounding
    return (blocked.product(exact, w, out=jnp.float32) * sx).astype(x.dtype)


def _one_sum(xq: jax.Array, sx: jax.Array, w: LowBit) -> jax.Array:
    y = row_sums(xq, w).astype(jnp.float32) * w.kind.unit
    if w.zeros is not None:
        y = y - xq.astype(jnp.int32).sum(-1, keepdims=True).astype(jnp.float32) * w.zeros.T.astype(jnp.float32)
    return y * float_scales(w).T * sx
