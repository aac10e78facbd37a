"""Weight-only product on Hopper: tiles of codes go through TMA to shared memory, are decoded in registers and multiply
x from there (wgmma with its left operand in registers): `y.T = w @ x.T`, so that few rows of x waste little.

Codes of 8 and of 4 bits are tiles of their own type: four-bit bytes read as int4 give the inputs in *stream* order, low
nibble first, and x is brought into it. Codes of 2, 3 and 6 bits are tiles of bytes, with a product for every piece.
Scales ride in the same pipeline, a row of outputs a group, and are spread over the columns of a tile by selects; with
one group they multiply the finished sum. Zero points are taken off afterwards by a small product of XLA. The inputs are
split over blocks where the outputs alone would leave multiprocessors idle; XLA adds the parts.

Not run on a device yet: lowered and compiled for an H200.

Stability: internal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels._core import packing
from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu, mosaic_gpu_refuses
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, Element
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales, of_piece, x_pieces

ROWS = 64  # outputs of a tile: one warpgroup's wgmma
BLOCKS = 2 * 132  # thread blocks that fill an H100 or H200
MOST_GROUPS = 4  # in a tile of columns
STAGES = 4
SHARED_BYTES = 200 << 10  # of the 227 KiB of a block


def streams(element: str) -> bool:
    """Whether codes are tiles of their own type, with x in stream order."""
    return ELEMENTS[element].bits in (4, 8)


def tiles(call: Any) -> tuple[int, int]:
    """(columns of a tile, groups in it); (0, 0) where no tile fits."""
    bits = ELEMENTS[call.element].bits
    columns = call.k if streams(call.element) else call.k // packing.per_byte(bits)
    of_group = columns if streams(call.element) else call.k * packing.PLANES[bits][0] // 8
    of_group //= call.groups
    for tile in (128, 64):
        inside = 1 if call.groups == 1 else max(1, tile // of_group)
        whole = call.groups == 1 or tile % of_group == 0 or of_group % tile == 0
        if columns % tile == 0 and whole and inside <= MOST_GROUPS:
            return tile, inside
    return 0, 0


def refuses(call: Any) -> str | None:
    """Why the Hopper form cannot serve a call, or None."""
    if reason := mosaic_gpu_refuses():
        return reason
    if call.dtype != "bfloat16":
        return f"activations are {call.dtype}, it multiplies bfloat16"
    if call.interpret:
        return "jax's interpreter of Mosaic GPU takes no wgmma operand from registers"
    if call.n % ROWS:
        return f"{call.n} outputs are no multiple of {ROWS}"
    if not tiles(call)[0]:
        return f"{call.k} inputs in {call.groups} groups do not cut into tiles of 64 columns with {MOST_GROUPS} groups"
    return None


def product(call: Any, x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]` bfloat16, weight of N outputs -> `bfloat16[M, N]`."""
    scales, (tile, inside) = float_scales(w), tiles(call)
    rows = rows_at_once(call, tile)
    padded = jnp.pad(x, ((0, -call.m % rows), (0, 0)))
    if streams(call.element):
        codes, pieces = [as_streamed(w)], in_stream_order(padded, w)[None]
    else:
        codes, pieces = list(w.planes), x_pieces(padded, w)
    sides = [of_piece(scales, w, side).T for side in range(len(w.planes))]
    parts = _kernel_call(call, codes, pieces.mT, sides, rows, tile, inside)
    y = parts.sum(0).T[: call.m]
    if call.groups == 1:
        y = y * scales.T
    if w.zeros is not None:
        sums = x.astype(jnp.float32).reshape(call.m, call.groups, -1).sum(-1)
        y = y - sums @ (scales * w.zeros.astype(jnp.float32)).T
    return y.astype(x.dtype)


def as_streamed(w: LowBit) -> jax.Array:
    """Codes as an array of their own type, `[N, K]` in stream order; no bytes are moved."""
    if w.kind.bits == 8:
        return w.codes
    return lax.bitcast_convert_type(w.codes, jnp.int4).reshape(w.outputs, w.inputs)


def in_stream_order(x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]` in the order of `as_streamed`."""
    return x if w.kind.bits == 8 else jnp.moveaxis(x_pieces(x, w), 0, -1).reshape(x.shape)


def stage_bytes(call: Any, tile: int, rows: int) -> int:
    """Shared memory of one stage of the pipeline, scales (small) aside."""
    bits = ELEMENTS[call.element].bits
    pieces = 1 if streams(call.element) else packing.per_byte(bits)
    weights = bits * ROWS * tile // 8 if streams(call.element) else (2 * len(packing.PLANES[bits]) - 1) * ROWS * tile
    return weights + pieces * tile * rows * 2


def rows_at_once(call: Any, tile: int) -> int:
    """Rows of x in a tile: all of them where they are few, and so many that two stages fit."""
    wanted = next((size for size in (16, 32, 64) if call.m <= size), 128)
    fitting = (size for size in (128, 64, 32, 16) if 2 * stage_bytes(call, tile, size) <= SHARED_BYTES)
    return min(wanted, next(fitting))


def split(call: Any, rows: int, steps: int) -> int:
    """Into how many parts the inputs are split."""
    blocks = (call.n // ROWS) * -(-call.m // rows)
    return next((parts for parts in (8, 4, 2) if blocks * parts <= BLOCKS and steps % parts == 0), 1)


def decoded(codes: jax.Array, element: Element, sides: tuple[jax.Array, ...] = (), index: int = 0) -> jax.Array:
    """A tile as bfloat16: of codes of their own type, or piece `index` of tiles of bytes."""
    if element.kind == "int" and not sides:
        return codes.astype(jnp.bfloat16)
    if element.kind == "float8":
        return codes.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)
    field = codes.astype(jnp.int16) if not sides else packing.field(sides, element.bits, index)
    if element.kind == "int":
        half = 2 ** (element.bits - 1)
        return ((field ^ half) - half).astype(jnp.bfloat16)
    # Sign, exponent and mantissa at their places in a half-precision number, as `elements.raw`.
    sign = element.exponent + element.mantissa
    half = ((field & (2**sign - 1)) << (10 - element.mantissa)) | ((field & 2**sign) << (15 - sign))
    out = lax.bitcast_convert_type(half.astype(jnp.int16), jnp.float16).astype(jnp.float32) * element.raw_unit
    return out.astype(jnp.bfloat16)


def _kernel_call(call: Any, codes, x, scales, rows: int, tile: int, inside: int) -> jax.Array:
    from jax.experimental import pallas as pl

    plgpu = mosaic_gpu()
    element, planes, pieces = ELEMENTS[call.element], len(scales), x.shape[0]
    columns, m = x.shape[1:]
    steps = columns // tile
    parts = split(call, rows, steps)
    each, of_tile = steps // parts, max(1, columns // (call.groups // planes or 1) // tile)
    bits = 4 if codes[0].dtype == jnp.int4 else 8
    stages = min(STAGES, each, SHARED_BYTES // stage_bytes(call, tile, rows))
    w_swizzle, x_swizzle = tile * bits // 8, min(128, rows * 2)
    w_layout = (plgpu.TilingTransform((8, w_swizzle * 8 // bits)), plgpu.SwizzleTransform(w_swizzle))
    x_layout = (plgpu.TilingTransform((8, x_swizzle // 2)), plgpu.SwizzleTransform(x_swizzle))
    spread, by_row = call.groups > 1, plgpu.Layout.WGMMA.reduce(1)

    def kernel(*refs):
        *arrays, out_ref = refs
        n_at, m_at, part = (lax.axis_index(name) for name in ("n", "m", "part"))

        def weight_spec(side: int):
            return plgpu.BlockSpec((ROWS, tile), lambda i: (n_at, part * each + i + side * steps), transforms=w_layout)

        def scale_spec(g: int):
            return plgpu.BlockSpec((None, ROWS), lambda i: ((part * each + i) // of_tile * inside + g, n_at))

        def x_spec(piece: int):
            return plgpu.BlockSpec((None, tile, rows), lambda i: (piece, part * each + i, m_at), transforms=x_layout)

        # The first plane once for each half of its columns, the second, half as wide, once.
        specs = [weight_spec(side) for side in range(planes)] + [weight_spec(0)] * (planes - 1)
        given = [arrays[0]] * planes + list(arrays[1:planes])
        specs, given = specs + [x_spec(p) for p in range(pieces)], given + [arrays[planes]] * pieces
        if spread:
            specs += [scale_spec(g) for _ in range(planes) for g in range(inside)]
            given += [array for array in arrays[planes + 1 :] for _ in range(inside)]

        def summed(acc):
            def step(_, *tiles_here):
                w_tiles, rest = tiles_here[: 2 * planes - 1], tiles_here[2 * planes - 1 :]
                x_tiles, scale_tiles = rest[:pieces], rest[pieces:]
                for side in range(planes):
                    whole = None if not spread else scale_columns(scale_tiles[side * inside : (side + 1) * inside])
                    loaded = [w_tiles[at][...] for at in ((side,) if planes == 1 else (side, planes))]
                    bytes_ = () if bits == 4 or element.bits == 8 else tuple(t.astype(jnp.int16) for t in loaded)
                    for index in range(side, pieces, planes):
                        dense = decoded(loaded[0], element, bytes_, index)
                        plgpu.wgmma(acc, dense if whole is None else dense * whole, x_tiles[index])
                plgpu.wgmma_wait(0)

            plgpu.emit_pipeline(step, grid=(each,), in_specs=specs, max_concurrent_steps=stages)(*given)
            return acc[...]

        def scale_columns(refs):
            columns = []
            for ref in refs:
                one = plgpu.load(ref, layout=by_row, optimized=False)
                columns.append(lax.broadcast_in_dim(one.astype(jnp.bfloat16), (ROWS, tile), (0,)))
            at = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=plgpu.Layout.WGMMA)
            out = columns[0]
            for g in range(1, inside):
                out = jnp.where(at >= g * (tile // inside), columns[g], out)
            return out

        accumulator = plgpu.ACC((ROWS, rows), jnp.float32)
        sums = pl.run_scoped(summed, accumulator)
        out_ref[part, pl.ds(n_at * ROWS, ROWS), pl.ds(m_at * rows, rows)] = sums

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, call.n, m), jnp.float32),
        grid=(call.n // ROWS, m // rows, parts),
        grid_names=("n", "m", "part"),
    )(*codes, x, *(scales if spread else ()))
