"""Shapes of real weights in the formats, for lowering, compiling and benchmarks: 4096 x 4096 and 4096 x 14336 of Llama.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import packing
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS
from jaxinfer.pallas_kernels.matmul.weight import LowBit

# name -> element, inputs a scale (None: all), zeros, rows a scale, dtype of the scales
FORMATS: dict[str, tuple[str, int | None, bool, int, str]] = {
    "int8": ("int8", None, False, 1, "float32"),
    "int8 group=128": ("int8", 128, False, 1, "float32"),
    "int4 group=64 zeros": ("int4", 64, True, 1, "float32"),
    "int3 group=64 zeros": ("int3", 64, True, 1, "float32"),
    "int2 group=64 zeros": ("int2", 64, True, 1, "float32"),
    "fp8 128x128": ("e4m3", 128, False, 128, "float32"),
    "fp6": ("e3m2", None, False, 1, "float32"),
    "mxfp4": ("e2m1", 32, False, 1, "uint8"),
    "nvfp4": ("e2m1", 16, False, 1, "float8_e4m3fn"),
    "ternary": ("int2", None, False, 1, "float32"),
}
SHAPES = ((4096, 4096), (14336, 4096))  # outputs, inputs


def weight(name: str, n: int, k: int) -> LowBit:
    """A weight of `n` outputs and `k` inputs in the named format, as shapes and dtypes."""
    element, group, zeros, rows, scales = FORMATS[name]
    kind, group = ELEMENTS[element], group or k
    planes = packing.PLANES[kind.bits]

    def array(columns: int, dtype: str, outputs: int = n) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((outputs, columns), jnp.dtype(dtype))

    return LowBit(
        array(k * planes[0] // 8, kind.stored),  # pyright: ignore[reportArgumentType]
        array(k // group, scales, n // rows),  # pyright: ignore[reportArgumentType]
        array(k // group, "int8") if zeros else None,  # pyright: ignore[reportArgumentType]
        array(k * planes[1] // 8, "uint8") if len(planes) > 1 else None,  # pyright: ignore[reportArgumentType]
        jax.ShapeDtypeStruct((1, 1), jnp.float32) if scales.startswith("float8") else None,  # pyright: ignore[reportArgumentType]
        element,
    )
