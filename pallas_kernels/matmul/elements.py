"""Elements: what a code of a few bits stands for, and the nearest code of a value.

Integers are two's complement. Minifloats EeMm are sign, e exponent bits, m mantissa bits, with subnormals and without
infinities or NaN: decoding them needs a shift and no table, and every value times `2**-exponent_of_unit` is an integer,
so products of them can be summed in integers. The two 8-bit floats are those of machine-learning hardware.
Sources: OCP Microscaling Formats specification 1.0 (e2m1); Wu et al. 2023, ZeroQuant(4+2), 2312.08583 (e3m2, here with
its bias of 3); Micikevicius et al. 2022, FP8 formats for deep learning, 2209.05433 (e4m3, e5m2).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.pallas_kernels._core import packing


@dataclasses.dataclass(frozen=True)
class Element:
    """`kind`: "int", "minifloat" (below 8 bits) or "float8"; `top`: the largest value."""

    name: str
    bits: int
    kind: str
    top: float
    exponent: int = 0
    mantissa: int = 0

    @property
    def stored(self) -> str:
        """Dtype of the (first) plane."""
        if self.kind == "float8":
            return "float8_e4m3fn" if self.name == "e4m3" else "float8_e5m2"
        return "int8" if self.bits == 8 else "uint8"

    @property
    def unit(self) -> float:
        """The smallest positive value: 1 for integers; every value is a multiple of it."""
        return 2.0 ** (2 - 2 ** (self.exponent - 1) - self.mantissa) if self.kind != "int" else 1.0

    @property
    def raw_unit(self) -> float:
        """What makes values of `raw` codes: two to the difference of the biases of half precision and the element."""
        return 1.0 if self.kind == "int" else 2.0 ** (16 - 2 ** (self.exponent - 1))


ELEMENTS = {
    element.name: element
    for element in (
        Element("int8", 8, "int", 127.0),
        Element("int4", 4, "int", 7.0),
        Element("int3", 3, "int", 3.0),
        Element("int2", 2, "int", 1.0),
        Element("e2m1", 4, "minifloat", 6.0, 2, 1),
        Element("e3m2", 6, "minifloat", 28.0, 3, 2),
        Element("e4m3", 8, "float8", 448.0, 4, 3),
        Element("e5m2", 8, "float8", 57344.0, 5, 2),
    )
}


def integer(field: jax.Array, element: Element) -> jax.Array:
    """`u8` codes of an integer or a minifloat as integers, `i32`: the value in multiples of `unit`."""
    if element.kind == "int":
        return packing.signed(field, element.bits).astype(jnp.int32)
    c, m = field.astype(jnp.int32), element.mantissa
    exponent = (c >> m) & (2**element.exponent - 1)
    fraction = (c & (2**m - 1)) | (jnp.minimum(exponent, 1) << m)
    size = fraction << jnp.maximum(exponent - 1, 0)
    return jnp.where(c >> (element.bits - 1) == 0, size, -size)


def raw(field: jax.Array, element: Element) -> jax.Array:
    """Codes as `f32`, short of the factor `element.raw_unit`: `u8` fields of planes, whole codes, or these as bytes.

    Sign, exponent and mantissa of a float go to their places in a half-precision number, which has room for the
    subnormals of all of these; its exponent is off by a constant, the factor.
    """
    if element.kind == "int":
        whole = field if element.bits == 8 else packing.signed(field, element.bits)
        return whole.astype(jnp.float32)
    bits = field if field.dtype == jnp.uint8 else lax.bitcast_convert_type(field, jnp.uint8)
    bits, sign = bits.astype(jnp.uint16), element.exponent + element.mantissa
    half = ((bits & (2**sign - 1)) << (10 - element.mantissa)) | ((bits & 2**sign) << (15 - sign))
    out = lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)
    return jnp.where(jnp.abs(out) > element.top / element.raw_unit, jnp.nan, out) if element.name == "e4m3" else out


def value(field: jax.Array, element: Element) -> jax.Array:
    """What codes stand for, `f32`; NaN and the infinities of e5m2 come through."""
    out = raw(field, element)
    return out if element.raw_unit == 1.0 else out * element.raw_unit


def value32(field: jax.Array, element: Element) -> jax.Array:
    """`value` for machines without half precision, all in 32 bits: `i32` fields (whole codes as bytes) to `f32`."""
    if element.kind == "int":
        half = 2 ** (element.bits - 1)
        return ((field ^ half) - half).astype(jnp.float32)
    e, m = element.exponent, element.mantissa
    size = field & (2 ** (e + m) - 1)
    out = lax.bitcast_convert_type((size << (23 - m)) + ((128 - 2 ** (e - 1)) << 23), jnp.float32)
    out = jnp.where(size < 2**m, size.astype(jnp.float32) * element.unit, out)  # subnormals have no such place
    if element.name == "e4m3":
        out = jnp.where(size == 0x7F, jnp.nan, out)
    if element.name == "e5m2":
        out = jnp.where(size > 0x7C, jnp.nan, jnp.where(size == 0x7C, jnp.inf, out))
    return jnp.where(field >> (e + m) == 0, out, -out)


def float8(x: jax.Array) -> jax.Array:
    """A float8 array as f32: XLA's own conversion is slower on a CPU."""
    return value(x, ELEMENTS["e5m2" if x.dtype == jnp.float8_e5m2 else "e4m3"])


def nearest(x: jax.Array, element: Element) -> jax.Array:
    """Codes nearest to `x f32[...]`, ties to the even code, beyond the top to the top; dtype as stored, or u8 fields.

    Integers clip to the whole two's complement range: who wants a symmetric grid clips first.
    """
    if element.kind == "int":
        low, high = -(2 ** (element.bits - 1)), 2 ** (element.bits - 1) - 1
        codes = jnp.clip(jnp.round(x), low, high).astype(jnp.int8)
        return codes if element.bits == 8 else packing.unsigned(codes, element.bits)
    if element.kind == "float8":
        return jnp.clip(x, -element.top, element.top).astype(element.stored)
    size = jnp.minimum(jnp.abs(x), element.top)
    # The spacing of codes around |x|: 2**(exponent - mantissa), with the subnormals' spacing at the bottom.
    _, exponent = jnp.frexp(size)
    lowest = 2 - 2 ** (element.exponent - 1)
    exponent = jnp.where(size == 0, lowest, jnp.maximum(exponent - 1, lowest))
    steps = jnp.round(jnp.ldexp(size, element.mantissa - exponent)).astype(jnp.int32)
    code = ((exponent - lowest) << element.mantissa) + steps  # a carry of steps moves to the next exponent by itself
    return (code | (jnp.signbit(x).astype(jnp.int32) << (element.bits - 1))).astype(jnp.uint8)


def table(element: Element) -> np.ndarray:
    """The value of every code, in code order, written out from the definition; what tests compare with."""
    codes = np.arange(2**element.bits)
    if element.kind == "int":
        return np.where(codes >= 2 ** (element.bits - 1), codes - 2**element.bits, codes).astype(np.float32)
    e, m, bias = element.exponent, element.mantissa, 2 ** (element.exponent - 1) - 1
    exponent, fraction = codes >> m & (2**e - 1), codes & (2**m - 1)
    size = np.where(exponent == 0, fraction * 2.0 ** (1 - bias - m), (1 + fraction / 2**m) * 2.0 ** (exponent - bias))
    out = np.where(codes >> (e + m) == 1, -size, size)
    if element.name == "e4m3":
        out[codes & 0x7F == 0x7F] = np.nan
    if element.name == "e5m2":
        out = np.where(exponent == 31, np.where(fraction == 0, np.copysign(np.inf, out), np.nan), out)
    return out.astype(np.float32)
