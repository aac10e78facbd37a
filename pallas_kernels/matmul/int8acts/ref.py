"""Integer product, the oracle: round the activations, sum integers a group at a time, dequantize each sum.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.sums8 import codes8
from jaxinfer.pallas_kernels.matmul.weight import LowBit, fields, float_scales

TOP = 127.0


def quantize_rows(x: jax.Array, groups: int = 1) -> tuple[jax.Array, jax.Array]:
    """`x[M, K]` as `(i8[M, K], f32[M, groups])`: the absmax of a row, or of a group of it, becomes 127.

    A row that is not finite has a scale that is not, whatever its codes: it stays alone with it.
    """
    wide = x.astype(jnp.float32).reshape(x.shape[0], groups, -1)
    absmax = jnp.abs(wide).max(-1)
    scales = jnp.where(absmax == 0, 1.0, jnp.maximum(absmax / TOP, jnp.finfo(jnp.float32).tiny))
    codes = jnp.clip(jnp.round(wide / scales[..., None]), -TOP, TOP).astype(jnp.int8)
    return codes.reshape(x.shape), scales


def int8_ref(x: jax.Array, w: LowBit, per_group: bool) -> jax.Array:
    """`x[M, K]` -> `f32[M, N]`: `sum_g sx_g * s_g * (sum_k x_k q_k - z_g sum_k x_k)`."""
    xq, sx = quantize_rows(x, w.groups if per_group else 1)
    xg = xq.reshape(x.shape[0], w.groups, -1).astype(jnp.int32)
    wg = codes8(fields(w), w.element).reshape(w.outputs, w.groups, -1).astype(jnp.int32)
    sums = jnp.einsum("mgk,ngk->mgn", xg, wg).astype(jnp.float32) * w.kind.unit
    if w.zeros is not None:
        sums = sums - xg.sum(-1).astype(jnp.float32)[..., None] * w.zeros.T.astype(jnp.float32)
    return (sums * float_scales(w).T * sx[..., None]).sum(1)
