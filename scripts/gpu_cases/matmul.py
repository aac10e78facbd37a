"""Weight-only products on the GPU: every format at 1, 16, 64 and 512 rows, and what the same product costs dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_bench.matmul import weight

from jaxinfer.pallas_kernels.matmul.arg_specs import FORMATS
from jaxinfer.pallas_kernels.matmul.lowbit import lowbit_matmul
from jaxinfer.pallas_kernels.matmul.weight import LowBit, dequantize

from .case import GpuCase

SIZE = 8192  # of int4, 35 MB: beyond what stays in the cache from call to call
ROWS = (1, 16, 64, 512)


def cases(seed: int) -> Iterator[GpuCase]:
    """`xla` of a weight-only case is the bfloat16 product that it replaces: cuBLAS."""
    for i, name in enumerate(FORMATS):
        for m in ROWS:
            yield weight_only(seed + i, name, m, SIZE)


def weight_only(seed: int, name: str, m: int, size: int) -> GpuCase:
    """`x[m, size]` in bfloat16 by a random weight of a format; bound by the bytes stored or the sums."""
    w = weight(name, size)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(m, size)), jnp.bfloat16)
    wide = dequantize(w).astype(jnp.bfloat16).T

    def ours(x: jax.Array, w: LowBit, wide: jax.Array) -> jax.Array:
        return lowbit_matmul(x, w, impl="gpu")

    def cublas(x: jax.Array, w: LowBit, wide: jax.Array) -> jax.Array:
        return x @ wide

    def oracle() -> Any:
        return np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64).T

    return GpuCase(
        name=f"lowbit_matmul {name} {m}x{size}x{size} bfloat16 beside cuBLAS",
        dtype="bfloat16",
        arguments=(x, w, wide),
        ours=ours,
        xla=cublas,
        oracle=oracle,
        tolerance=1e-2,
        flops=2.0 * m * size * size,
        bytes=float(sum(a.nbytes for a in jax.tree.leaves(w)) + 2 * 2 * m * size),
    )
