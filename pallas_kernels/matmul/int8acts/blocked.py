"""Integer product in plain XLA: int8 by int8 into int32 where a whole row is one sum.

On a CPU that product is several times faster than the float one (from two rows on: a single one gets a second of
zeros). Codes below 8 bits are unpacked to int8 a piece at a time, so that no whole copy of the weight exists. Sums of
short groups have no fast integer product in XLA's CPU library: with several groups the rounded activations go through
the float product of `lowbit`, which is the same up to the rounding of float32 sums, and faster.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.matmul.int8acts.ref import codes8, quantize_rows
from jaxinfer.pallas_kernels.matmul.lowbit import blocked
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales, piece, x_pieces

BY_ROWS = (((1,), (1,)), ((), ()))


def product(x: jax.Array, w: LowBit, per_group: bool) -> jax.Array:
    """`x[M, K]` float, weight of N outputs -> `x.dtype[M, N]`."""
    xq, sx = quantize_rows(x, w.groups if per_group else 1)
    if w.groups > 1 and per_group:
        rounded = xq.reshape(*sx.shape, -1).astype(jnp.float32) * sx[..., None]
        return blocked.product(rounded.reshape(x.shape), w).astype(x.dtype)
    if w.groups > 1:
        exact = xq.astype(x.dtype if x.dtype == jnp.bfloat16 else jnp.float32)  # up to 127: no rounding
        return (blocked.product(exact, w, out=jnp.float32) * sx).astype(x.dtype)
    y = _one_group(xq, w) * w.kind.unit
    if w.zeros is not None:
        y = y - xq.astype(jnp.int32).sum(-1, keepdims=True).astype(jnp.float32) * w.zeros.T.astype(jnp.float32)
    return (y * float_scales(w).T * sx).astype(x.dtype)


def _one_group(xq: jax.Array, w: LowBit) -> jax.Array:
    """Sums of whole rows, `f32[M, N]`; below 8 bits a piece is unpacked at a time."""
    m = xq.shape[0]
    cut = x_pieces(jnp.pad(xq, ((0, 1), (0, 0))) if m == 1 else xq, w)
    sums = jnp.zeros((cut.shape[1], w.outputs), jnp.int32)
    for index in range(w.pieces):
        codes = codes8(piece(w, index), w.element)
        sums += lax.dot_general(cut[index], codes, BY_ROWS, preferred_element_type=jnp.int32)
    return sums[:m].astype(jnp.float32)
