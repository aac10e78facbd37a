"""Weight-only product of few rows on CPU, in integers: x as three digits of int8, one below the other.

A row of x is its absmax / 127 times `d0 + d1 / 254 + d2 / 254**2` with digits of -127 to 127: 23 bits of fixed point
under the row's largest magnitude, so that the error of a product is that of float32 sums. The digits are rows of one
int8 product with the codes, which are read as they stand: a fourth of the bytes of float32, and no float copy of them
that a compiler could hoist out of a loop. On 4096 x 4096 int8 weights and two cores one row took 0.9 ms where the
float32 product took 2.2 and decoded blocks 1.7, and eight rows 1.9 where these took 2.8 and 2.0.

Stability: internal.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS
from jaxinfer.pallas_kernels.matmul.sums8 import FITTING, MOST_INPUTS, row_sums
from jaxinfer.pallas_kernels.matmul.weight import LowBit, float_scales

DIGITS = 3
BASE = 254.0
MOST_ROWS, MOST_ROWS_PACKED = 8, 2  # from there on the digits cost more than decoding the weight as floats


def refuses(call: Any) -> str | None:
    """Why the digits cannot serve a call, or None."""
    if call.groups > 1:
        return f"it sums whole rows of a weight with one scale each, got {call.groups} groups"
    if call.element not in FITTING:
        return f"values of {call.element} are no small integers"
    most = MOST_ROWS if ELEMENTS[call.element].bits == 8 else MOST_ROWS_PACKED
    if call.m > most:
        return f"it is for up to {most} rows of {call.element}, got {call.m}"
    if call.k > MOST_INPUTS:
        return f"int32 holds sums of up to {MOST_INPUTS} inputs, got {call.k}"
    return None


def product(call: Any, x: jax.Array, w: LowBit) -> jax.Array:
    """`x[M, K]`, weight of N outputs with one group -> `x.dtype[M, N]`."""
    digits, unit = digits_of(x.astype(jnp.float32))
    sums = row_sums(digits.reshape(-1, call.k), w).astype(jnp.float32).reshape(DIGITS, call.m, call.n) * w.kind.unit
    if w.zeros is not None:
        ones = digits.astype(jnp.int32).sum(-1, keepdims=True).astype(jnp.float32)
        sums = sums - ones * w.zeros.T.astype(jnp.float32)
    y = sums[DIGITS - 1]
    for place in range(DIGITS - 2, -1, -1):
        y = y / BASE + sums[place]
    return (y * float_scales(w).T * unit).astype(x.dtype)


def digits_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x f32[M, K]` as `(i8[DIGITS, M, K], unit f32[M, 1])`, x = unit * sum(digit[i] / BASE**i).

    A row that is not finite has a unit that is not, whatever its digits: it stays alone with it.
    """
    absmax = jnp.abs(x).max(-1, keepdims=True)
    unit = jnp.where(absmax == 0, 1.0, jnp.maximum(absmax / 127.0, jnp.finfo(jnp.float32).tiny))
    rest, digits = x / unit, []
    for _ in range(DIGITS):
        digit = jnp.clip(jnp.round(rest), -127, 127)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * BASE
    return jnp.stack(digits), unit
