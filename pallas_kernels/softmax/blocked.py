"""The Two-Pass Softmax in XLA: one pass for the sum as a pair, one for the output; runs anywhere.

Dukhan & Ablavatski, 2020 (arXiv 2001.04438). The sum runs in lanes, each with its own pair, so that the pass is
elementwise and vectorizes; UNROLL pieces are added between reading and writing the lanes' pairs. On a CPU this gains
nothing: measured on 2^24 and 64 x 2^18 floats, a copy of the array takes two thirds of the usual form's time, and the
read that is saved costs less than the arithmetic of the pairs.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.softmax.pair import LIMIT, minus_exponent, pair, power

Array = jax.Array
LANES = 16384  # of all rows together: their pairs stay in cache, as does a row of LANES * UNROLL
UNROLL = 8


def forward(x: Array, *, block: int | None) -> Array:
    """Softmax of x [rows, n] over its last axis, in its dtype; `block` lanes a row."""
    rows, length = x.shape
    lanes = block or (LANES if length <= LANES * UNROLL else max(1024, LANES // rows))
    exponent, total = row_sums(x.astype(jnp.float32), lanes)
    return output(x.astype(jnp.float32), exponent, total).astype(x.dtype)


def backward(y: Array, d_out: Array) -> Array:
    """The gradient of x from the output y and its cotangent, [rows, n]: XLA fuses it in two passes."""
    y32, d32 = y.astype(jnp.float32), d_out.astype(jnp.float32)
    return (y32 * (d32 - lane_sums(y32 * d32))).astype(y.dtype)


def backward_fused(y: Array, d_out: Array) -> Array:
    """As `backward`, the sums left to XLA: right where its sum of one row is no scalar loop."""
    y32, d32 = y.astype(jnp.float32), d_out.astype(jnp.float32)
    return (y32 * (d32 - (y32 * d32).sum(-1, keepdims=True))).astype(y.dtype)


def lane_sums(x: Array) -> Array:
    """Sums over the last axis, [rows, 1]. A few long rows run in lanes: XLA's sum of one row is a scalar loop, into
    which it fuses what makes the terms (an exponential here), 70 times slower on 2^24 floats."""
    rows, length = x.shape
    lanes = max(1024, LANES // rows)
    steps = length // lanes
    if rows >= 8 or steps < 4:
        return x.sum(-1, keepdims=True)

    def step(i: Array, sums: Array) -> Array:
        return sums + lax.dynamic_slice_in_dim(x, i * lanes, lanes, 1)

    sums = lax.fori_loop(0, steps, step, jnp.zeros((rows, lanes)))
    return sums.sum(-1, keepdims=True) + x[:, steps * lanes :].sum(-1, keepdims=True)


def row_sums(x: Array, lanes: int) -> tuple[Array, Array]:
    """(n, m) [rows, 1] with sum e^x = m 2^n; n is the largest exponent of the row."""
    rows, length = x.shape
    width = lanes * UNROLL
    steps = length // width

    def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        # Slices of x, not of its pairs: XLA fuses these into the sum, and would store those.
        starts = [i * width + j * lanes for j in range(UNROLL)]
        return added(sums, [pair(lax.dynamic_slice_in_dim(x, start, lanes, 1)) for start in starts])

    if not steps:
        return usual(x)
    start = (jnp.zeros((rows, lanes)), jnp.full((rows, lanes), -jnp.inf))
    mantissas, exponents = lax.fori_loop(0, steps, step, start)
    if length % width:
        exponent, total = usual(x[:, steps * width :])
        mantissas, exponents = jnp.append(mantissas, total, 1), jnp.append(exponents, exponent, 1)
    top = exponents.max(-1, keepdims=True)
    return top, (mantissas * power(exponents - top)).sum(-1, keepdims=True)


def usual(x: Array) -> tuple[Array, Array]:
    """`row_sums` of short rows by a maximum and a sum: the second read finds them in cache."""
    exponent = pair(x.max(-1, keepdims=True))[1]
    weights = jnp.exp(minus_exponent(jnp.clip(x, -LIMIT, LIMIT), exponent))
    return exponent, jnp.where(x == -jnp.inf, 0.0, weights).sum(-1, keepdims=True)


def added(sums: tuple[Array, Array], terms: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Sums of pairs, elementwise: mantissas meet at the largest exponent, so none grows beyond the count of terms."""
    mantissa, exponent = sums
    top = exponent
    for _, n in terms:
        top = jnp.maximum(top, n)
    mantissa = mantissa * power(exponent - top)
    for m, n in terms:
        mantissa = mantissa + m * power(n - top)
    return mantissa, top


def output(x: Array, exponent: Array, total: Array) -> Array:
    """e^x / (total 2^exponent), elementwise; zeros where the total is 0."""
    scale = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), total)  # a NaN stays
    return jnp.exp(minus_exponent(jnp.clip(x, -LIMIT, LIMIT), exponent)) * scale
