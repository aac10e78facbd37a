"""Weights as floats of a few bits: float8 with block scales, MXFP4, NVFP4, and FP6 in two planes. Round-to-nearest.

- `Fp8`: e4m3 or e5m2 with one scale for a block of `rows` outputs by `group` inputs, absmax to the largest code.
- `MxFp4`: e2m1 in groups of 32 with a power of two as scale (E8M0). Several rules choose the exponent: "ocp" is the
  specification's, floor(log2(absmax)) - 2, which saturates a block whose absmax has a mantissa above 1.5; "nearest"
  takes the next power from a mantissa of 1.75 on, as compressed-tensors does; "ceil" is the least that never saturates.
- `NvFp4`: e2m1 in groups of 16 with e4m3 scales and one float32 factor a matrix, absmax / (448 * 6).
- `Fp6`: e3m2 with one scale per output channel, stored as a plane of four bits and a plane of two.

Guarantee: approximate. State: none.
Sources: Micikevicius et al. 2022, FP8 formats for deep learning, 2209.05433; DeepSeek-AI 2024, DeepSeek-V3, 2412.19437
(float8 activations, a scale a group); Rouhani et al. 2023, Microscaling data formats, 2310.10537; Egiazarian et al.
2025, 2509.23202 (MXFP4 and NVFP4 for weights; NVFP4 is NVIDIA's); Wu et al. 2023, ZeroQuant(4+2), 2312.08583.
Departures: MXFP4's byte 0 stands for 2**-126 and not 2**-127, which CPUs flush to zero; FP6 scales are float32 unless
asked otherwise.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, float8, nearest
from jaxinfer.pallas_kernels.matmul.weight import LowBit, make
from jaxinfer.quant.integers import nonzero
from jaxinfer.quant.quantized import FLOAT8_ACTIVATIONS, FLOATS, RowSpec, check_activations, check_group, groups_of

RULES = ("ocp", "nearest", "ceil")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(RowSpec):
    """float8 weights. `element`: "e4m3" or "e5m2". A scale serves `group` inputs (None: all) by `rows` outputs.

    Where `rows` does not divide the outputs, it is their greatest common divisor instead. `activations`: "float"; or
    "float8" to round each row of the other operand to e4m3 as well; or "float8-group" to give each group of such a row
    its own scale (DeepSeek-V3's recipe, with the default blocks).
    """

    element: str = "e4m3"
    group: int | None = 128
    rows: int = 128
    scales: str = "float32"
    activations: str = "float"

    def __post_init__(self):
        super().__post_init__()
        check_group("Fp8", self.group)
        check_activations("Fp8", self.activations, FLOAT8_ACTIVATIONS)
        check_group("Fp8: rows", self.rows, optional=False)
        if self.element not in ("e4m3", "e5m2"):
            raise ConfigError(f"Fp8: element must be e4m3 or e5m2, got {self.element!r}")
        if self.scales not in FLOATS:
            raise ConfigError(f"Fp8: scales must be one of {', '.join(FLOATS)}, got {self.scales!r}")

    def encode(self, rows: jax.Array) -> LowBit:
        """`rows f32[..., N, K]` in blocks."""
        *lead, n, k = rows.shape
        groups, kind = groups_of("Fp8", k, self.group, self.element), ELEMENTS[self.element]
        each = math.gcd(self.rows, n)
        x = rows.reshape(*lead, n // each, each, groups, k // groups)
        scales = nonzero(jnp.abs(x).max((-1, -3)) / kind.top, self.scales)
        codes = nearest(x / scales[..., None, :, None], kind).reshape(rows.shape)
        return make(codes, scales.astype(self.scales), self.element)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MxFp4(RowSpec):
    """4-bit floats in groups of 32 that share a power of two. `rule`: how its exponent is chosen."""

    rule: str = "ocp"

    def __post_init__(self):
        super().__post_init__()
        if self.rule not in RULES:
            raise ConfigError(f"MxFp4: rule must be one of {', '.join(RULES)}, got {self.rule!r}")

    def encode(self, rows: jax.Array) -> LowBit:
        """`rows f32[..., N, K]` in groups of 32."""
        groups, kind = groups_of("MxFp4", rows.shape[-1], 32, "e2m1"), ELEMENTS["e2m1"]
        x = rows.reshape(*rows.shape[:-1], groups, 32)
        byte = mx_exponent(jnp.abs(x).max(-1), self.rule)
        inverse = jnp.ldexp(1.0, 127 - byte.astype(jnp.int32))[..., None]
        codes = nearest(x * inverse, kind).reshape(rows.shape)
        return make(codes, byte, "e2m1")


def mx_exponent(absmax: jax.Array, rule: str) -> jax.Array:
    """The scale byte, `u8`, of groups of e2m1 with this absmax: 1 to 254, or 255 where absmax is not finite."""
    mantissa, exponent = jnp.frexp(absmax)  # mantissa in [0.5, 1): exact, where a rounded log2 misses powers of two
    exponent = exponent - 1 - 2  # of the largest power of two in the group, over that of the largest code
    if rule == "nearest":
        exponent = exponent + (mantissa >= 1.75 / 2)
    if rule == "ceil":
        exponent = exponent + (mantissa > 1.5 / 2)
    byte = jnp.where(absmax == 0, 1, jnp.clip(exponent + 127, 1, 254))
    return jnp.where(jnp.isfinite(absmax), byte, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NvFp4(RowSpec):
    """4-bit floats in groups of 16 with float8 scales, and one factor for the whole matrix."""

    def encode(self, rows: jax.Array) -> LowBit:
        """`rows f32[..., N, K]` in groups of 16."""
        groups, kind, of_scale = groups_of("NvFp4", rows.shape[-1], 16, "e2m1"), ELEMENTS["e2m1"], ELEMENTS["e4m3"]
        x = rows.reshape(*rows.shape[:-1], groups, 16)
        absmax = jnp.abs(x).max(-1)
        factor = nonzero(absmax.max((-1, -2), keepdims=True) / (kind.top * of_scale.top), "float32")
        scales = nearest(absmax / kind.top / factor, of_scale)
        whole = float8(scales) * factor
        inverse = jnp.where(whole == 0, 0, 1 / jnp.where(whole == 0, 1, whole))  # a group too small for its scale is 0
        codes = nearest(x * inverse[..., None], kind)
        return make(codes.reshape(rows.shape), scales, "e2m1", factor=factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp6(RowSpec):
    """6-bit floats e3m2 with one scale per output channel, or per group of inputs."""

    group: int | None = None
    scales: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_group("Fp6", self.group)
        if self.scales not in FLOATS:
            raise ConfigError(f"Fp6: scales must be one of {', '.join(FLOATS)}, got {self.scales!r}")

    def encode(self, rows: jax.Array) -> LowBit:
        """`rows f32[..., N, K]` in groups."""
        groups, kind = groups_of("Fp6", rows.shape[-1], self.group, "e3m2"), ELEMENTS["e3m2"]
        x = rows.reshape(*rows.shape[:-1], groups, -1)
        scales = nonzero(jnp.abs(x).max(-1) / kind.top, self.scales)
        codes = nearest(x / scales[..., None], kind).reshape(rows.shape)
        return make(codes, scales.astype(self.scales), "e3m2")
