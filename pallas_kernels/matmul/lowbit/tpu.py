"""Weight-only product on TPU: tiles of codes are decoded in registers and multiplied as bfloat16 or float32.

Grid (outputs, rows, columns of bytes), the last one summed into scratch memory. A tile of bytes holds a piece of the
inputs for each code that shares a byte, so a step makes as many products as there are pieces, each with its own piece
of x. The scales of a tile's groups become columns and are spread over the lanes of their group by
selects; with one group they multiply the finished sum instead. Zero points never meet the codes: what they take away is
a small product of the groups' sums of x, made by XLA.

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
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, value32
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales, of_piece, x_pieces

LANES = 128
VMEM_BYTES = 64 << 20
BY_ROWS = (((1,), (1,)), ((), ()))


def columns_of(k: int, groups: int, element: str) -> tuple[int, int]:
    """(columns of a piece, columns of a group within it)."""
    bits = ELEMENTS[element].bits
    return k // packing.per_byte(bits), k // groups * packing.PLANES[bits][0] // 8


def columns_at_once(call: Any) -> int:
    """The widest tile of columns that holds whole groups, or lies within one."""
    columns, of_group = columns_of(call.k, call.groups, call.element)
    fits = (size for size in (512, 256, LANES) if columns % size == 0)
    return next(size for size in fits if call.groups == 1 or size % of_group == 0 or of_group % size == 0)


def refuses(call: Any) -> str | None:
    """Why the TPU form cannot serve a call, or None."""
    columns, of_group = columns_of(call.k, call.groups, call.element)
    if call.dtype == "float16":
        return "TPUs have no float16 products; use bfloat16"
    if columns % LANES or call.n % LANES:
        return f"pieces of {columns} inputs and {call.n} outputs are not both multiples of {LANES} lanes"
    if call.groups > 1 and LANES % of_group and of_group % LANES:
        return f"a group holds {of_group} columns, which neither divide {LANES} lanes nor are a multiple of them"
    return None


def product(call: Any, x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]`, weight of N outputs -> `x.dtype[M, N]`."""
    m, n, planes = call.m, call.n, len(w.planes)
    columns, of_group = columns_of(call.k, call.groups, call.element)
    bm = min(-(-m // 16) * 16, 256)
    bn = call.block or (256 if n % 256 == 0 else LANES)
    bc = columns_at_once(call)
    steps = columns // bc
    cut = jnp.pad(x_pieces(x, w), ((0, 0), (0, -m % bm), (0, 0)))
    codes = [lax.bitcast_convert_type(plane, jnp.uint8) for plane in w.planes]
    scales = float_scales(w)
    in_specs = [pl.BlockSpec((w.pieces, bm, bc), lambda j, i, k: (0, i, k))]
    # The first plane once for each half of its columns, the second, half as wide, once.
    in_specs += [pl.BlockSpec((bn, bc), functools.partial(_half, side * steps)) for side in range(planes)]
    in_specs += [pl.BlockSpec((bn, bc), functools.partial(_half, 0))] * (planes - 1)
    arrays = [cut, *codes[:1] * planes, *codes[1:]]
    if call.groups == 1:
        here = 0
        in_specs.append(pl.BlockSpec((1, bn), lambda j, i, k: (0, j)))
        arrays.append(scales.T)
    else:
        here, repeat = max(1, bc // of_group), max(1, of_group // bc)
        sides = [of_piece(scales, w, side) for side in range(planes)]
        tiles = jnp.stack(sides).reshape(planes, n, -1, here).transpose(0, 2, 3, 1)  # [planes, tiles, groups, N]
        in_specs.append(pl.BlockSpec((planes, 1, here, bn), lambda j, i, k: (0, k // repeat, 0, j)))
        arrays.append(tiles)
    kernel = functools.partial(_kernel, element=call.element, planes=planes, here=here, of_group=of_group, steps=steps)
    y = pl.pallas_call(
        kernel,
        grid=(n // bn, cut.shape[1] // bm, steps),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((bm, bn), lambda j, i, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((cut.shape[1], n), jnp.float32 if w.zeros is not None else x.dtype),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=call.interpret,
    )(*arrays)[:m]
    if w.zeros is not None:
        sums = x.astype(jnp.float32).reshape(m, call.groups, -1).sum(-1)
        y = y - sums @ (scales * w.zeros.astype(jnp.float32)).T
    return y.astype(x.dtype)


def _half(offset: int, j: jax.Array, i: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    return j, k + offset


def _kernel(x_ref, *refs, element: str, planes: int, here: int, of_group: int, steps: int):
    codes, rest = refs[: 2 * planes - 1], refs[2 * planes - 1 :]
    scales_ref, out_ref, acc_ref = rest
    kind, k = ELEMENTS[element], pl.program_id(2)

    @pl.when(k == 0)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    # Named for bfloat16 too: a default of "highest" from outside has no meaning for it here.
    exact = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else lax.Precision.DEFAULT
    for side in range(planes):
        sides = tuple(c[...].astype(jnp.int32) for c in ([codes[side], codes[-1]] if planes == 2 else codes))
        spread = None if here == 0 else _spread(scales_ref[side, 0], of_group, x_ref.shape[2])
        for index in range(side, x_ref.shape[0], planes):
            dense = value32(packing.field(sides, kind.bits, index), kind)
            dense = dense if spread is None else dense * spread
            acc_ref[...] += lax.dot_general(
                x_ref[index], dense.astype(x_ref.dtype), BY_ROWS, precision=exact, preferred_element_type=jnp.float32
            )

    @pl.when(k == steps - 1)
    def _finish():
        y = acc_ref[...]
        out_ref[...] = (y * scales_ref[...] if here == 0 else y).astype(out_ref.dtype)


def _spread(scales: jax.Array, of_group: int, columns: int) -> jax.Array:
    """Scales of the groups of a tile `[groups, rows]`, each over the columns of its group: `[rows, columns]`."""
    by_row, width = scales.T, min(of_group, columns)
    lane = lax.broadcasted_iota(jnp.int32, (by_row.shape[0], columns), 1)
    out = jnp.broadcast_to(by_row[:, :1], lane.shape)
    for g in range(1, by_row.shape[1]):
        out = jnp.where(lane >= g * width, by_row[:, g : g + 1], out)
    return out
