"""int8 activations by integer weights in groups, on TPU: int8 products, dequantized a tile at a time.

Grid (outputs, rows, columns of bytes), the last one summed into float32 scratch memory. A tile of columns lies within
one group, and its int32 sums are multiplied by the group's scale (and the rows', with `per_group`). Where a group is
narrower than the 128 lanes, a tile holds several and meets x once for each, with the other groups' inputs at zero. Zero
points never meet the codes: what they take away is a small product of the groups' sums of x, made by XLA.

Not run on a device yet: interpreted, lowered and compiled for TPU.

Stability: internal.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.pallas_kernels._core import packing
from jaxinfer.pallas_kernels.matmul.acts8.ref import quantize_rows, without_zeros
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, value32
from jaxinfer.pallas_kernels.matmul.lowbit.tpu import LANES, VMEM_BYTES, columns_of
from jaxinfer.pallas_kernels.matmul.sums8 import BY_ROWS
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales, x_pieces

MOST_GROUPS = 4  # in a tile


def refuses(call: Any) -> str | None:
    """Why the TPU form cannot serve a call, or None."""
    kind = ELEMENTS[call.element]
    columns, of_group = columns_of(call.k, call.groups, call.element)
    if call.activations != "int8":
        return 'it multiplies int8; for float8 see "blocked"'
    if len(packing.PLANES[kind.bits]) > 1:
        return f"codes of {kind.bits} bits lie in two planes, it takes those of one"
    if call.groups == 1 and kind.bits == 8:
        return "a weight of one group is one product of XLA's"
    if call.dtype == "float16":
        return "TPUs have no float16; use bfloat16"
    if columns % LANES or call.n % LANES:
        return f"pieces of {columns} inputs and {call.n} outputs are not both multiples of {LANES} lanes"
    if of_group % LANES and (LANES % of_group or LANES // of_group > MOST_GROUPS):
        return f"a group holds {of_group} columns, neither a multiple of {LANES} nor 1 / 2 to 1 / {MOST_GROUPS} of them"
    return None


def product(call: Any, x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]` float, weight of N outputs -> `x.dtype[M, N]`."""
    m, n = call.m, call.n
    columns, of_group = columns_of(call.k, call.groups, call.element)
    bm, bn = min(-(-m // 32) * 32, 256), call.block or (256 if n % 256 == 0 else LANES)
    bc = next(size for size in (512, 256, LANES) if max(of_group, LANES) % size == 0)
    here, repeat, steps = max(1, bc // of_group), max(1, of_group // bc), columns // bc
    xq, sx = quantize_rows(x, w.groups if call.per_group else 1)
    cut = jnp.pad(x_pieces(xq, w), ((0, 0), (0, -m % bm), (0, 0)))
    tiles = (float_scales(w) * w.kind.unit).T.reshape(-1, here, n)  # [tiles, groups, N]
    in_specs = [
        pl.BlockSpec((w.pieces, bm, bc), lambda j, i, k: (0, i, k)),
        pl.BlockSpec((bn, bc), lambda j, i, k: (j, k)),
        pl.BlockSpec((1, here, bn), lambda j, i, k: (k // repeat, 0, j)),
    ]
    arrays = [cut, w.codes, tiles]
    if call.per_group:
        of_rows = jnp.pad(sx, ((0, -m % bm), (0, 0))).reshape(-1, call.groups // here, here).swapaxes(0, 1)
        in_specs.append(pl.BlockSpec((1, bm, here), lambda j, i, k: (k // repeat, i, 0)))
        arrays.append(of_rows)
    y = pl.pallas_call(
        functools.partial(_kernel, element=call.element, of_group=of_group, here=here, steps=steps),
        grid=(n // bn, cut.shape[1] // bm, steps),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((bm, bn), lambda j, i, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((cut.shape[1], n), jnp.float32),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=call.interpret,
    )(*arrays)[:m]
    return without_zeros(y if call.per_group else y * sx, w, xq, sx).astype(x.dtype)


def _kernel(x_ref, codes_ref, scales_ref, *refs, element: str, of_group: int, here: int, steps: int):
    *rows_ref, out_ref, acc_ref = refs
    kind, k = ELEMENTS[element], pl.program_id(2)
    exact = lax.Precision.DEFAULT  # named: a default of "highest" from outside has no meaning for integers

    @pl.when(k == 0)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    for index in range(x_ref.shape[0]):
        x, codes = x_ref[index], _integers(codes_ref, kind, index)
        for g in range(here):
            mine = x
            if here > 1:
                lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
                mine = jnp.where(lane // of_group == g, x.astype(jnp.int32), 0).astype(jnp.int8)
            sums = lax.dot_general(mine, codes, BY_ROWS, precision=exact, preferred_element_type=jnp.int32)
            sums = sums.astype(jnp.float32) * scales_ref[0, g : g + 1, :]
            acc_ref[...] += sums * rows_ref[0][0, :, g : g + 1] if rows_ref else sums

    @pl.when(k == steps - 1)
    def _finish():
        out_ref[...] = acc_ref[...]


def _integers(codes_ref, kind, index: int) -> jax.Array:
    """Piece `index` of a tile as int8, in units of the element."""
    if kind.bits == 8:
        return codes_ref[...]
    field = packing.field((codes_ref[...].astype(jnp.int32),), kind.bits, index)
    return (value32(field, kind) / kind.unit).astype(jnp.int32).astype(jnp.int8)
