"""8-bit activations by 8-bit weights in groups, on Hopper: tiles meet in wgmma as they are stored, int8 or e4m3.

`y.T = w @ x.T`, so that few rows of x waste little. A step multiplies a tile of inputs, which lies within one group,
into an accumulator of its own and adds that to float32 sums times the group's scale, and with `per_group` the row's.
For float8 this is also what keeps long sums right: wgmma adds float8 products with fewer bits than float32 has
(DeepSeek-AI 2024, 2412.19437, section 3.3). The inputs are split over blocks where the outputs alone would leave
multiprocessors idle; XLA adds the parts and takes off what zero points ask for.

Not run on a device yet: interpreted, lowered and compiled for an H200.

Stability: internal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu, mosaic_gpu_refuses
from jaxinfer.pallas_kernels.matmul.acts8.ref import quantize_rows, without_zeros
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS
from jaxinfer.pallas_kernels.matmul.lowbit.gpu import BLOCKS, ROWS
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales

STAGES = 4


def tile_of(call: Any) -> int:
    """Inputs of a step, all of one group; 0 where none fits."""
    return next((tile for tile in (128, 64) if call.k // call.groups % tile == 0), 0)


def refuses(call: Any) -> str | None:
    """Why the Hopper form cannot serve a call, or None."""
    if reason := mosaic_gpu_refuses():
        return reason
    if ELEMENTS[call.element].bits != 8 or call.element == "e5m2":
        return f"the weight's codes are {call.element}, it multiplies int8 and e4m3"
    if call.groups == 1:
        return "a weight of one group is one product of XLA's"
    if call.n % ROWS:
        return f"{call.n} outputs are no multiple of {ROWS}"
    if not tile_of(call):
        return f"a group of {call.k // call.groups} inputs is no multiple of 64"
    return None


def product(call: Any, x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]` float, weight of N outputs -> `x.dtype[M, N]`."""
    xq, sx = quantize_rows(x, w.groups if call.per_group else 1, call.activations)
    rows = next((size for size in (16, 32, 64) if call.m <= size), 128)
    more = -call.m % rows
    of_rows = [jnp.pad(sx, ((0, more), (0, 0))).T] if call.per_group else []
    y = _kernel_call(call, w.codes, jnp.pad(xq, ((0, more), (0, 0))), [float_scales(w).T, *of_rows], rows)
    y = y.sum(0).T[: call.m]
    return without_zeros(y if call.per_group else y * sx, w, xq, sx).astype(x.dtype)


def split(call: Any, rows: int, steps: int) -> int:
    """Into how many parts the inputs are split."""
    blocks = (call.n // ROWS) * -(-call.m // rows)
    return next((parts for parts in (8, 4, 2) if blocks * parts <= BLOCKS and steps % parts == 0), 1)


def _kernel_call(call: Any, codes: jax.Array, x: jax.Array, scales: list[jax.Array], rows: int) -> jax.Array:
    from jax.experimental import pallas as pl

    plgpu = mosaic_gpu()
    tile, m = tile_of(call), x.shape[0]
    steps = call.k // tile
    parts = split(call, rows, steps)
    each, of_group = steps // parts, call.k // call.groups // tile
    summed_as = jnp.int32 if call.activations == "int8" else jnp.float32
    layout = (plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(tile))  # a byte each: a tile's row is a swizzle

    def kernel(*refs):
        *arrays, out_ref = refs
        n_at, m_at, part = (lax.axis_index(name) for name in ("n", "m", "part"))

        def group(i):
            return (part * each + i) // of_group

        specs = [
            plgpu.BlockSpec((ROWS, tile), lambda i: (n_at, part * each + i), transforms=layout),
            plgpu.BlockSpec((rows, tile), lambda i: (m_at, part * each + i), transforms=layout),
            plgpu.BlockSpec((None, ROWS), lambda i: (group(i), n_at)),
            plgpu.BlockSpec((None, rows), lambda i: (group(i), m_at)),
        ]

        def step(_, w_tile, x_tile, *rest):
            *sides, total = rest

            def multiplied(acc):
                plgpu.wgmma(acc, w_tile, x_tile.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return acc[...]

            accumulator = plgpu.ACC((ROWS, rows), summed_as)
            sums = pl.run_scoped(multiplied, accumulator).astype(jnp.float32)
            for axis, side in enumerate(sides):  # the outputs' scales stand down the tile, the rows' across
                along = plgpu.Layout.WGMMA.reduce(1 - axis)
                column = plgpu.load(side, layout=along, optimized=False)
                sums = sums * lax.broadcast_in_dim(column, sums.shape, (axis,))
            return total + sums

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, rows), jnp.float32), plgpu.Layout.WGMMA)
        pipeline = plgpu.emit_pipeline(
            step, grid=(each,), in_specs=specs[: len(arrays)], max_concurrent_steps=min(STAGES, each), init_carry=zeros
        )
        out_ref[part, pl.ds(n_at * ROWS, ROWS), pl.ds(m_at * rows, rows)] = pipeline(*arrays)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, call.n, m), jnp.float32),
        grid=(call.n // ROWS, m // rows, parts),
        grid_names=("n", "m", "part"),
        **({"interpret": plgpu.InterpretGPUParams()} if call.interpret else {}),
    )(codes, x, *scales)
