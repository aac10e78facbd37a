"""Weight-only product in plain XLA: decode a block of rows to floats, multiply it by all of x, go on to the next.

A block of decoded rows stays in the cache of a CPU, so that reading the weight costs its packed bytes, and no dense
copy of it ever exists. The weight is the left operand (`w @ x.T`): for the right one, XLA's CPU library repacks it.
Products are summed in float32. With at most `FEW` rows of x the decoded weight is float32 even for bfloat16 x: there
the CPU's bfloat16 product is slower (and the float32 one more exact).

Stability: internal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels._core import packing
from jaxinfer.pallas_kernels.matmul.elements import raw
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales, of_piece, piece, x_pieces

FEW = 16
BLOCK_BYTES = 8 << 20  # of decoded weight: what was fastest in the last-level cache of 2-core machines
BLOCK_ROWS = 512
STRIPS = 16


def prepared(w: LowBit) -> LowBit:
    """The weight with float32 scales for `raw` codes, one a row, and float8 as bytes (XLA would widen each slice)."""
    codes = lax.bitcast_convert_type(w.codes, jnp.uint8) if w.kind.kind == "float8" else w.codes
    scales = float_scales(w)
    return LowBit(codes, scales * w.kind.raw_unit, w.zeros, w.high, None, w.element)


def blocking(w: LowBit, rows: int | None = None) -> tuple[int, int]:
    """`(strips, rows of each decoded at a time)`.

    A block takes the same rows of every strip, not neighbours: where a mesh splits the outputs, every device then holds
    a part of every block, and nothing is gathered.
    """
    if rows is None:
        rows = min(BLOCK_ROWS, BLOCK_BYTES // (4 * w.inputs))
    strips = STRIPS if w.outputs % STRIPS == 0 and w.outputs > rows else 1
    return strips, min(max(1, rows // strips), w.outputs // strips)


def product(x: jax.Array, w: LowBit, rows: int | None = None, out: Any = None) -> jax.Array:
    """`x[M, K]`, weight of N outputs -> `[M, N]` of dtype `out`, by default that of x."""
    m, n, after, w = x.shape[0], w.outputs, w.groups == 1 and w.zeros is None, prepared(w)
    strips, size = blocking(w, rows)
    wide = jnp.float32 if m <= FEW or x.dtype != jnp.bfloat16 else jnp.bfloat16
    columns = x_pieces(x.astype(wide), w)  # [pieces, M, K / pieces]
    if wide == jnp.float32:
        columns = columns.mT
    contract = (((1,), (0 if wide == jnp.float32 else 1,)), ((), ()))

    def block(start: jax.Array) -> jax.Array:
        some = block_of(w, start, strips, size)
        sums = jnp.zeros((some.outputs, m), jnp.float32)
        for index in range(w.pieces):
            dense = decoded_piece(some, index, scaled=not after).astype(wide)
            sums += lax.dot_general(dense, columns[index], contract, preferred_element_type=jnp.float32)
        return (sums * some.scales if after else sums).reshape(strips, size, m)

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, n // strips - size)  # the last block reaches back over rows done before
        return lax.dynamic_update_slice(y, block(start), (0, start, 0))

    steps = -(-n // strips // size)
    if steps == 1:
        y = block(jnp.int32(0))
    else:
        y = lax.fori_loop(0, steps, step, jnp.zeros((strips, n // strips, m), jnp.float32))
    return y.reshape(n, m).T.astype(out or x.dtype)


def product_across(y: jax.Array, w: LowBit, rows: int | None = None) -> jax.Array:
    """`y[M, N]` summed over the outputs of the weight -> `[M, K]`: the transposed product, and the gradient of x."""
    m, n, w = y.shape[0], w.outputs, prepared(w)
    strips, size = blocking(w, rows)
    wide = jnp.float32 if m <= FEW or y.dtype != jnp.bfloat16 else jnp.bfloat16
    y_strips = y.astype(wide).reshape(m, strips, n // strips)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, n // strips - size)
        some = block_of(w, start, strips, size)
        here = lax.dynamic_slice_in_dim(y_strips, start, size, 2)
        fresh = jnp.arange(size) >= i * size - start  # rows that the block before has done already count once
        here = jnp.where(fresh, here, 0).reshape(m, -1)
        dense = (decoded_piece(some, index).astype(wide) for index in range(w.pieces))
        return out + jnp.stack([jnp.matmul(here, d, preferred_element_type=jnp.float32) for d in dense])

    start = jnp.zeros((w.pieces, m, w.inputs // w.pieces), jnp.float32)
    out = lax.fori_loop(0, -(-n // strips // size), step, start)
    return packing.join(out, w.kind.bits, w.group).astype(y.dtype)


def block_of(w: LowBit, start: jax.Array, strips: int, size: int) -> LowBit:
    """Rows `start` to `start + size` of every strip of a prepared weight."""

    def rows(x: jax.Array) -> jax.Array:
        cut = x.reshape(strips, -1, x.shape[1])
        return lax.dynamic_slice_in_dim(cut, start, size, 1).reshape(strips * size, x.shape[1])

    zeros = None if w.zeros is None else rows(w.zeros)
    high = None if w.high is None else rows(w.high)
    return LowBit(rows(w.codes), rows(w.scales), zeros, high, None, w.element)


def decoded_piece(w: LowBit, index: int, *, scaled: bool = True) -> jax.Array:
    """One piece of every group of a prepared weight, `f32[N, K / pieces]`; not `scaled`: without zeros and scales."""
    x = raw(piece(w, index), w.kind)
    if not scaled:
        return x
    scales = of_piece(w.scales, w, index)
    grouped = x.reshape(*scales.shape, -1)
    if w.zeros is not None:
        grouped = grouped - of_piece(w.zeros, w, index).astype(jnp.float32)[..., None]
    return (grouped * scales[..., None]).reshape(x.shape)
