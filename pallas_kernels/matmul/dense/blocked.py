"""One row against a matrix on CPU: the sum over K in two halves, so that both cores read the weights.

XLA's CPU backend runs a product of one row as one task on one core, which reads weights at half of the machine's rate.
As a batch of two products over the halves of K it is two tasks; the halves are a reshape of the weights, no copy. On
two cores this took 0.65 to 0.9 of the plain product's time for 256 x 768 to 4096 x 4096 matrices that come from memory.
From two rows on XLA shares the work among cores by itself and the split only costs.

Stability: internal.
"""

import jax
from jax import lax

PARTS = 2
SMALLEST = 1 << 15  # weights; below this the product costs no more than handing it to another core


def split_refuses(call: tuple[int, int, int, str]) -> str | None:
    """Why the split form does not serve `(M, K, N, dtype)`, or None."""
    rows, inner, outer, dtype = call
    if rows != 1:
        return f"it is for one row, got {rows}: more rows are shared among cores by themselves"
    if dtype != "float32":
        return f"it is for float32, got {dtype}"
    if inner % PARTS:
        return f"K must be a multiple of {PARTS}, got {inner}"
    if inner * outer < SMALLEST:
        return f"{inner} x {outer} weights are too few to share, it takes {SMALLEST} or more"
    return None


def dense_split(call: tuple[int, int, int, str], x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[K, N]` of one row as the sum of `PARTS` products."""
    _, inner, outer, _ = call
    halves = x.reshape(1, PARTS, inner // PARTS)
    parts = lax.dot_general(halves, w.reshape(PARTS, inner // PARTS, outer), (((2,), (1,)), ((1,), (0,))))
    return parts.sum(0).reshape(*x.shape[:-1], outer)


def dense_plain(call: tuple[int, int, int, str], x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's own product."""
    return x @ w
