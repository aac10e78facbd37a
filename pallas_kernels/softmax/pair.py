"""e^x as a pair, mantissa times a power of two whose exponent is a float32: no x overflows it, none underflows.

Dukhan & Ablavatski, The Two-Pass Softmax Algorithm, 2020 (arXiv 2001.04438), section 3. Here the argument's reduction
splits the exponent in two, so that it is exact without fused multiply-add up to |x| = 2^23.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
LIMIT = 2.0**23  # beyond it float32 has no fractions, and x is taken to be this
_LOG2_E = 1.4426950408889634
# ln 2 in parts of 9 and 12 bits, whose products with integers of 12 bits are exact, and a rest.
_LN2 = (0.693359375, -3560 * 2.0**-24, -1.904654299958e-9)
_TAYLOR = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def pair(x: Array) -> tuple[Array, Array]:
    """f32 m in [0.7, 1.42] ([0.5, 2] where |x| > 10^5) and integral n with e^x = m 2^n; x = -inf gives m = 0."""
    reduced = jnp.clip(x, -LIMIT, LIMIT)
    n = jnp.round(reduced * _LOG2_E)
    r = minus_exponent(reduced, n)
    m = jnp.full_like(r, 1 / 5040)
    for coefficient in _TAYLOR:  # degree 7: the rest is below 1e-8 for |r| <= ln 2 / 2
        m = m * r + coefficient
    return jnp.where(x == -jnp.inf, 0.0, m), n


def minus_exponent(x: Array, n: Array) -> Array:
    """x - n ln 2, to float32's precision for any integral n up to 2^24: largest parts first, so that they cancel."""
    high = jnp.round(n * 2.0**-12) * 2.0**12
    low = n - high
    for part in _LN2[:2]:
        x = (x - high * part) - low * part
    return x - n * _LN2[2]


def power(n: Array) -> Array:
    """2^n for integral n <= 0, zero below -126: built from its bits."""
    exponent = jnp.maximum(n, -127.0).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)
