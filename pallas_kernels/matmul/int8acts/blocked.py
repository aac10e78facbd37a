"""Integer product in plain XLA: int8 by int8 into int32, one group of the inputs after the other.

On a CPU the int8 product is several times faster than the float one; codes below 8 bits are unpacked to int8 a group at
a time, so that no whole copy of the weight exists. XLA's fast int8 product starts at two rows: a single one gets a
second of zeros.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels._core import packing
from jaxinfer.pallas_kernels.matmul.int8acts.ref import codes8, quantize_rows
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales, piece, x_pieces

ROWS_BY_COLUMNS = (((1,), (1,)), ((), ()))


def product(x: jax.Array, w: LowBit, per_group: bool) -> jax.Array:
    """`x[M, K]` float, weight of N outputs -> `x.dtype[M, N]`."""
    m = x.shape[0]
    xq, sx = quantize_rows(x, w.groups if per_group else 1)
    if m == 1:
        xq, sx = jnp.pad(xq, ((0, 1), (0, 0))), jnp.pad(sx, ((0, 1), (0, 0)))
    scales = float_scales(w)
    if w.groups == 1:
        y = _one_group(xq, w) * (scales.T * w.kind.unit)
    else:
        y = _by_groups(xq, sx if per_group else None, w, scales.T * w.kind.unit)
    y = y if per_group and w.groups > 1 else y * sx
    if w.zeros is not None:
        sums = xq.reshape(xq.shape[0], w.groups, -1).astype(jnp.int32).sum(-1).astype(jnp.float32) * sx
        y = y - sums @ (scales * w.zeros.astype(jnp.float32)).T
    return y[:m].astype(x.dtype)


def _dot(x: jax.Array, codes: jax.Array) -> jax.Array:
    return lax.dot_general(x, codes, ROWS_BY_COLUMNS, preferred_element_type=jnp.int32)


def _one_group(xq: jax.Array, w: LowBit) -> jax.Array:
    """Sums of whole rows, `f32[M, N]`; below 8 bits a piece is unpacked at a time."""
    cut = x_pieces(xq, w)
    sums = [_dot(cut[index], codes8(piece(w, index), w.element)) for index in range(w.pieces)]
    return sum(sums[1:], sums[0]).astype(jnp.float32)


def _by_groups(xq: jax.Array, sx: jax.Array | None, w: LowBit, scales: jax.Array) -> jax.Array:
    """The sum of the groups' products, each with its scale; of a group in each half, where pieces are halves."""
    m, halves = xq.shape[0], len(w.planes)
    cut, steps = x_pieces(xq, w), w.groups // halves

    def columns(x: jax.Array, i: jax.Array) -> jax.Array:
        each = x.shape[-1] // steps
        return lax.dynamic_slice_in_dim(x, i * each, each, -1)

    def scale(x: jax.Array, i: jax.Array, half: int, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, i + half * steps, 1, axis)

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        here = columns(cut, i)
        for half in range(halves):
            sums = jnp.zeros((m, w.outputs), jnp.int32)
            for index in range(half, w.pieces, halves):
                sums += _dot(here[index], codes8(columns_of_piece(w, index, i, steps), w.element))
            out = sums.astype(jnp.float32) * scale(scales, i, half, 0)
            y = y + (out if sx is None else out * scale(sx, i, half, 1))
        return y

    return lax.fori_loop(0, steps, step, jnp.zeros((m, w.outputs), jnp.float32))


def columns_of_piece(w: LowBit, index: int, step: jax.Array, steps: int) -> jax.Array:
    """Part `step` of `steps` of the columns of a piece, the planes cut before they are unpacked."""

    def cut(plane: jax.Array, sides: int) -> jax.Array:
        each = plane.shape[-1] // sides // steps
        start = (index % sides) * (plane.shape[-1] // sides) + step * each
        return lax.dynamic_slice_in_dim(plane, start, each, -1)

    if w.kind.bits == 8:
        return cut(w.codes, 1)
    return packing.field(tuple(cut(plane, len(w.planes) - i) for i, plane in enumerate(w.planes)), w.kind.bits, index)
