"""The Two-Pass Softmax as a TPU kernel (Dukhan & Ablavatski, 2020, arXiv 2001.04438): both passes in one grid.

A step takes ROWS rows and COLUMNS columns. In the first pass the pairs of the sum stay in VMEM, a pair a lane; in the
second the same blocks come again and leave as output. The last block of a row is masked, so nothing is padded.

Stability: experimental.
"""

from __future__ import annotations

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
    rows, length = x.shape
    columns = block or min(COLUMNS, pl.cdiv(length, 128) * 128)

    def kernel(x_ref: Any, out: Any, mantissas: Any, exponents: Any, exponent: Any, total: Any) -> None:
        writing, step = pl.program_id(1), pl.program_id(2)
        column = lax.broadcasted_iota(jnp.int32, (ROWS, columns), 1) + step * columns
        tile = jnp.where(column < length, x_ref[...].astype(jnp.float32), -jnp.inf)

        @pl.when((writing == 0) & (step == 0))
        def _() -> None:
            mantissas[...] = jnp.zeros_like(mantissas)
            exponents[...] = jnp.full_like(exponents, -jnp.inf)

        @pl.when(writing == 0)
        def _() -> None:
            mantissas[...], exponents[...] = added((mantissas[...], exponents[...]), [pair(tile)])

        @pl.when((writing == 1) & (step == 0))
        def _() -> None:
            top = exponents[...].max(-1, keepdims=True)
            exponent[...] = top
            total[...] = (mantissas[...] * power(exponents[...] - top)).sum(-1, keepdims=True)

        @pl.when(writing == 1)
        def _() -> None:
            out[...] = output(tile, exponent[...], total[...]).astype(out.dtype)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, ROWS), 2, pl.cdiv(length, columns)),
        in_specs=[pl.BlockSpec((ROWS, columns), lambda i, writing, j: (i, j))],
        # In the first pass the output's block stays the one that the second pass writes first.
        out_specs=pl.BlockSpec((ROWS, columns), lambda i, writing, j: (i, writing * j)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[
            pltpu.VMEM((ROWS, columns), jnp.float32),
            pltpu.VMEM((ROWS, columns), jnp.float32),
            pltpu.VMEM((ROWS, 1), jnp.float32),
            pltpu.VMEM((ROWS, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(x)
