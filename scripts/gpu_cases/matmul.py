"""Products with low-bit weights on the GPU at 1, 16, 64 and 512 rows, beside what the same product costs dense: every
format weight-only, and activations rounded to 8 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_bench.matmul import weight

from jaxinfer.pallas_kernels.matmul.acts8 import float8_matmul, int8_matmul, quantize_rows
from jaxinfer.pallas_kernels.matmul.arg_specs import FORMATS
from jaxinfer.pallas_kernels.matmul.lowbit import lowbit_matmul
from jaxinfer.pallas_kernels.matmul.weight import LowBit, dequantize

from .case import GpuCase

SIZE = 8192  # of int4, 35 MB: beyond what stays in the cache from call to call
ROWS = (1, 16, 64, 512)
ROUNDED = {"int8 group=128": (int8_matmul, "int8"), "fp8 128x128": (float8_matmul, "e4m3")}


def cases(seed: int) -> Iterator[GpuCase]:
    """`xla` of each case is the bfloat16 product that it replaces: cuBLAS."""
    for i, name in enumerate(FORMATS):
        for m in ROWS:
            yield weight_only(seed + i, name, m, SIZE)
    for name in ROUNDED:
        for m in ROWS:
            yield rounded(seed, name, m, SIZE)


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


def rounded(seed: int, name: str, m: int, size: int) -> GpuCase:
    """The same with x rounded to 8 bits, a scale a group; the oracle's x is rounded too."""
    (product, element), plain = ROUNDED[name], weight_only(seed, name, m, size)
    x, w, _ = plain.arguments

    def oracle() -> Any:
        codes, scales = quantize_rows(x, w.groups, element)
        values = np.asarray(codes.astype(jnp.float32), np.float64).reshape(m, w.groups, -1)
        values = values * np.asarray(scales, np.float64)[..., None]
        return values.reshape(m, size) @ np.asarray(dequantize(w), np.float64).T

    return dataclasses.replace(
        plain,
        name=f"{product.__name__} {name} {m}x{size}x{size} bfloat16 beside cuBLAS",
        ours=lambda x, w, wide: product(x, w, per_group=True, impl="gpu"),
        oracle=oracle,
    )
