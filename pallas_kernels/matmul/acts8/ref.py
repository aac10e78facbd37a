"""Products of rounded activations, the oracle: round them, sum a group at a time, dequantize each sum.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, nearest, value
from jaxinfer.pallas_kernels.matmul.sums8 import codes8
from jaxinfer.pallas_kernels.matmul.weight import LowBit, fields, float_scales


def quantize_rows(x: jax.Array, groups: int = 1, element: str = "int8") -> tuple[jax.Array, jax.Array]:
    """`x[M, K]` as `(codes[M, K], f32[M, groups])`: the absmax of a row, or of a group of it, becomes the largest code.

    `element`: "int8" or "e4m3". A row that is not finite has a scale that is not, whatever its codes: it stays alone
    with it.
    """
    kind, wide = ELEMENTS[element], x.astype(jnp.float32).reshape(x.shape[0], groups, -1)
    absmax = jnp.abs(wide).max(-1)
    scales = jnp.where(absmax == 0, 1.0, jnp.maximum(absmax / kind.top, jnp.finfo(jnp.float32).tiny))
    inside = jnp.clip(wide / scales[..., None], -kind.top, kind.top)  # integers keep off the lowest code
    return nearest(inside, kind).reshape(x.shape), scales


def without_zeros(y: jax.Array, w: LowBit, xq: jax.Array, sx: jax.Array) -> jax.Array:
    """`y f32[M, N]` less what zero points take away: each group's sum of the rounded x by zero and scale."""
    if w.zeros is None:
        return y
    sums = xq.astype(jnp.int32).reshape(xq.shape[0], w.groups, -1).sum(-1).astype(jnp.float32) * sx
    return y - sums @ (float_scales(w) * w.zeros.astype(jnp.float32)).T


def rounded_ref(x: jax.Array, w: LowBit, activations: str, per_group: bool) -> jax.Array:
    """`x[M, K]` -> `f32[M, N]`: `sum_g sx_g * s_g * (sum_k x_k q_k - z_g sum_k x_k)`."""
    xq, sx = quantize_rows(x, w.groups if per_group else 1, activations)
    if activations == "int8":
        x_codes, w_codes, unit = xq.astype(jnp.int32), codes8(fields(w), w.element).astype(jnp.int32), w.kind.unit
    else:
        x_codes, w_codes, unit = value(xq, ELEMENTS[activations]), value(fields(w), w.kind), 1.0
    xg, wg = (codes.reshape(codes.shape[0], w.groups, -1) for codes in (x_codes, w_codes))
    sums = jnp.einsum("mgk,ngk->mgn", xg, wg).astype(jnp.float32) * unit
    if w.zeros is not None:
        sums = sums - xg.sum(-1).astype(jnp.float32)[..., None] * w.zeros.T.astype(jnp.float32)
    return (sums * float_scales(w).T * sx[..., None]).sum(1)
