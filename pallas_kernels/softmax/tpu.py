"""The Two-Pass Softmax as a TPU kernel (Dukhan & Ablavatski, 2020, arXiv 2001.04438): both passes in one grid.

A step takes ROWS rows and COLUMNS columns. In the first pass the pairs of the sum stay in VMEM, a pair a lane; in the
second the same blocks come again and leave as output. The last block of a row is masked, so nothing is padded.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.pallas_kernels.softmax.blocked import added, output
from jaxinfer.pallas_kernels.softmax.pair import pair, power

Array = jax.Array
ROWS = 16  # a tile of bfloat16, two of float32
COLUMNS = 2048


def refuses(call: Any) -> str | None:
    """Why no TPU kernel serves the call, or None."""
    if call.dtype == "float16":
        return "the TPU has no float16"
    if call.block is not None and call.block % 128:
        return f"block={call.block} is not a multiple of the 128 lanes"
    return None


def forward(x: Array, *, block: int | None, interpret: bool) -> Array:
    """Softmax of x [rows, n] over its last axis."""

    def finish(mantissas: Array, exponents: Array) -> tuple[Array, Array]:
        top = exponents.max(-1, keepdims=True)
        return top, (mantissas * power(exponents - top)).sum(-1, keepdims=True)

    def add(sums: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        return added((sums[0], sums[1]), [pair(x)])

    return _two_passes(add, finish, output, (0.0, -jnp.inf), -jnp.inf, block, interpret, x)


def backward(y: Array, d_out: Array, *, block: int | None, interpret: bool) -> Array:
    """The gradient of x from the output y and its cotangent, [rows, n]."""
    return _two_passes(
        lambda sums, y, d: (sums[0] + y * d,), lambda sums: (sums.sum(-1, keepdims=True),),
        lambda y, d, total: y * (d - total), (0.0,), 0.0, block, interpret, y, d_out,
    )  # fmt: skip


def _two_passes(
    add: Callable[..., tuple[Array, ...]], finish: Callable[..., tuple[Array, ...]], write: Callable[..., Array],
    start: tuple[float, ...], nothing: float, block: int | None, interpret: bool, *arrays: Array,
) -> Array:  # fmt: skip
    """`write(entries, what finish made of the row)`, where `add` gathers the row's entries in lanes, from `start`.

    Beyond the row's end entries are `nothing`.
    """
    rows, length = arrays[0].shape
    columns = block or min(COLUMNS, pl.cdiv(length, 128) * 128)
    count = len(start)
    scratch = [pltpu.VMEM((ROWS, size), jnp.float32) for size in (columns, 1) for _ in start]

    def kernel(*refs: Any) -> None:
        inputs, out = refs[: len(arrays)], refs[len(arrays)]
        lanes, of_row = refs[len(arrays) + 1 :][:count], refs[len(arrays) + 1 :][count:]
        writing, step = pl.program_id(1), pl.program_id(2)
        column = lax.broadcasted_iota(jnp.int32, (ROWS, columns), 1) + step * columns
        tiles = [jnp.where(column < length, ref[...].astype(jnp.float32), nothing) for ref in inputs]

        @pl.when((writing == 0) & (step == 0))
        def _() -> None:
            for ref, value in zip(lanes, start, strict=True):
                ref[...] = jnp.full_like(ref, value)

        @pl.when(writing == 0)
        def _() -> None:
            for ref, value in zip(lanes, add(tuple(ref[...] for ref in lanes), *tiles), strict=True):
                ref[...] = value

        @pl.when((writing == 1) & (step == 0))
        def _() -> None:
            for ref, value in zip(of_row, finish(*(ref[...] for ref in lanes)), strict=True):
                ref[...] = value

        @pl.when(writing == 1)
        def _() -> None:
            out[...] = write(*tiles, *(ref[...] for ref in of_row)).astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, ROWS), 2, pl.cdiv(length, columns)),
        in_specs=[pl.BlockSpec((ROWS, columns), lambda i, writing, j: (i, j))] * len(arrays),
        # In the first pass the output's block stays the one that the second pass writes first.
        out_specs=pl.BlockSpec((ROWS, columns), lambda i, writing, j: (i, writing * j)),
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(*arrays)
