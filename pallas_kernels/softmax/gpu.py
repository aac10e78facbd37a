"""Softmax on Hopper: a row of up to HELD entries is read once and stays in registers; a longer one takes two passes.

Long rows are cut over blocks of threads that fill the machine. The first kernel leaves a pair, mantissa and exponent,
a block (Dukhan & Ablavatski, 2020, arXiv 2001.04438), XLA adds these few, and the second kernel reads the row again and
writes it: two reads and one write, and no pass for the maximum. The gradient does the same with its sums. Loads go
straight to registers in vectors of up to 16 bytes. What is left at a row's end is a tile that overlaps the one before
it, its first part masked, so nothing is padded.

Interpreted, and compiled for an H200; not run on a device.

Stability: experimental.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu, mosaic_gpu_refuses
from jaxinfer.pallas_kernels.softmax.blocked import added, output
from jaxinfer.pallas_kernels.softmax.pair import LIMIT, pair, power

Array = jax.Array
THREADS = 128
HELD = 8192  # entries of a row in registers, 64 a thread
TILE = 2048  # entries of a long row at a time
BLOCKS = 8 * 132  # blocks that fill an H100 or H200 and even out
Tile = tuple[int, int, int]  # start, width, and how many of its first entries the tile before it has


def refuses(call: Any) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    if reason := mosaic_gpu_refuses():
        return reason
    if call.block is not None:
        return f"its tiles are of {TILE} entries, got block={call.block}"
    if call.rows * call.length >= 2**31:
        return f"{call.rows} rows of {call.length} entries are more than 32 bits can count"
    if call.length < THREADS:
        return f"rows of {call.length} entries do not fill a warpgroup of {THREADS} threads"
    return None


def forward(x: Array, *, interpret: bool) -> Array:
    """Softmax of x [rows, n] over its last axis, in its dtype."""
    if x.shape[1] <= HELD:
        return _held(_normalized, interpret, x)
    mantissas, exponents = _sums(_add_pair, _one_pair, (0.0, -jnp.inf), -jnp.inf, interpret, x)
    top = exponents.max(-1, keepdims=True)
    total = (mantissas * power(exponents - top)).sum(-1, keepdims=True)
    return _mapped(output, interpret, (x,), (top, total))


def backward(y: Array, d_out: Array, *, interpret: bool) -> Array:
    """The gradient of x from the output y and its cotangent, [rows, n]."""
    if y.shape[1] <= HELD:
        return _held(_slopes, interpret, y, d_out)
    (sums,) = _sums(_add_product, lambda sums: (sums[0].sum(),), (0.0,), 0.0, interpret, y, d_out)
    return _mapped(lambda y, d, mean: y * (d - mean), interpret, (y, d_out), (sums.sum(-1, keepdims=True),))


def _normalized(tiles: list[list[Array]], fresh: list[Array | None]) -> list[Array]:
    """The usual form, in registers: the maximum costs no read."""
    top = jnp.clip(functools.reduce(jnp.maximum, [x.max() for (x,) in tiles]), -LIMIT, LIMIT)
    weights = [jnp.where(x == -jnp.inf, 0.0, jnp.exp(jnp.clip(x, -LIMIT, LIMIT) - top)) for (x,) in tiles]
    total = sum(_masked(w, mask, 0.0).sum() for w, mask in zip(weights, fresh, strict=True))
    scale = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), total)  # a NaN stays
    return [w * scale for w in weights]


def _slopes(tiles: list[list[Array]], fresh: list[Array | None]) -> list[Array]:
    products = [_masked(y * d, mask, 0.0) for (y, d), mask in zip(tiles, fresh, strict=True)]
    total = sum(p.sum() for p in products)
    return [y * (d - total) for y, d in tiles]


def _masked(x: Array, fresh: Array | None, other: float) -> Array:
    return x if fresh is None else jnp.where(fresh, x, other)


def _add_pair(sums: Sequence[Array], x: Array) -> tuple[Array, ...]:
    return added((sums[0], sums[1]), [pair(x)])


def _one_pair(sums: Sequence[Array]) -> tuple[Array, ...]:
    top = sums[1].max()
    return (sums[0] * power(sums[1] - top)).sum(), top


def _add_product(sums: Sequence[Array], y: Array, d: Array) -> tuple[Array, ...]:
    return (sums[0] + y * d,)


def vector(length: int, itemsize: int, width: int = THREADS) -> int:
    """Entries that a thread loads at once: they divide the row, so that every row begins aligned, and fill 16 bytes."""
    return next(n for n in (8, 4, 2, 1) if n * itemsize <= 16 and length % n == 0 and width >= THREADS * n)


def tiles_of_row(length: int, unit: int) -> list[Tile]:
    """One tile of whole units of `unit` entries, and one that ends with the row and overlaps the first."""
    whole = length // unit * unit
    return [(0, whole, 0)] + ([(length - unit, unit, whole - (length - unit))] if whole < length else [])


def _held(compute: Callable[..., list[Array]], interpret: bool, *arrays: Array) -> Array:
    """`compute` of the tiles of whole rows; a row a block."""
    rows, length = arrays[0].shape
    each = vector(length, max(a.dtype.itemsize for a in arrays), length)
    tiles = tiles_of_row(length, THREADS * each)

    def kernel(*refs: Any) -> None:
        *inputs, out = refs
        row = lax.axis_index("block")
        at = [(row, pl.ds(start, width)) for start, width, _ in tiles]
        values = [[ref[here].astype(jnp.float32) for ref in inputs] for here in at]
        fresh = [None if not seen else _columns(width, each) >= seen for _, width, seen in tiles]
        for here, value in zip(at, compute(values, fresh), strict=True):
            out[here] = value.astype(out.dtype)

    return _kernel(kernel, arrays[0], rows, interpret)(*arrays)


def _sums(
    add: Callable[..., tuple[Array, ...]], finish: Callable[..., tuple[Array, ...]], start: tuple[float, ...],
    nothing: float, interpret: bool, *arrays: Array,
) -> list[Array]:  # fmt: skip
    """What `add` gathers over each part of a row, in lanes, and `finish` makes one of: an array [rows, parts] each."""
    rows, length = arrays[0].shape
    each = vector(length, max(a.dtype.itemsize for a in arrays))
    parts, steps = _parts(rows, length)

    def kernel(*refs: Any) -> None:
        inputs, outs = refs[: len(arrays)], refs[len(arrays) :]
        row, part = lax.div(lax.axis_index("block"), parts), lax.rem(lax.axis_index("block"), parts)

        def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            first = i * TILE
            at = jnp.minimum(first, length - TILE)
            fresh = _columns(TILE, each) >= first - at
            values = [ref[row, pl.ds(pl.multiple_of(at, each), TILE)].astype(jnp.float32) for ref in inputs]
            return add(sums, *(jnp.where(fresh, v, nothing) for v in values))

        lanes = tuple(jnp.full((TILE,), value) for value in start)
        lanes = lax.fori_loop(part * steps, jnp.minimum((part + 1) * steps, pl.cdiv(length, TILE)), step, lanes)
        for out, value in zip(outs, finish(lanes), strict=True):
            out[row, part, :] = jnp.full((THREADS,), value)

    like = [jax.ShapeDtypeStruct((rows, parts, THREADS), jnp.float32)] * len(start)
    return [out[..., 0] for out in _kernel(kernel, like, rows * parts, interpret)(*arrays)]


def _mapped(f: Callable[..., Array], interpret: bool, arrays: tuple[Array, ...], of_row: tuple[Array, ...]) -> Array:
    """`f` of the entries and of what each row has one of, [rows, 1]."""
    rows, length = arrays[0].shape
    parts, steps = _parts(rows, length)
    each = vector(length, max(a.dtype.itemsize for a in arrays))

    def kernel(*refs: Any) -> None:
        inputs, scalars, out = refs[: len(arrays)], refs[len(arrays) : -1], refs[-1]
        row, part = lax.div(lax.axis_index("block"), parts), lax.rem(lax.axis_index("block"), parts)
        constants = [ref[row, 0] for ref in scalars]

        def step(i: Array, nothing: None) -> None:
            # The last tile overlaps the one before it, and both write the same there.
            here = (row, pl.ds(pl.multiple_of(jnp.minimum(i * TILE, length - TILE), each), TILE))
            out[here] = f(*(ref[here].astype(jnp.float32) for ref in inputs), *constants).astype(out.dtype)

        lax.fori_loop(part * steps, jnp.minimum((part + 1) * steps, pl.cdiv(length, TILE)), step, None)

    return _kernel(kernel, arrays[0], rows * parts, interpret)(*arrays, *of_row)


def _parts(rows: int, length: int) -> tuple[int, int]:
    """Into how many parts a row is cut, so that all rows' fill the machine, and the tiles of a part."""
    steps = pl.cdiv(length, TILE)
    each = pl.cdiv(steps, pl.cdiv(BLOCKS, rows))
    return pl.cdiv(steps, each), each


def _columns(width: int, each: int) -> Array:
    plgpu = mosaic_gpu()
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=each)
    return plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)


def _kernel(kernel: Callable[..., None], like: Any, blocks: int, interpret: bool) -> Any:
    plgpu = mosaic_gpu()
    return plgpu.kernel(
        kernel,
        out_type=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like),
        grid=(blocks,),  # one axis: the others of a grid end at 65535
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
