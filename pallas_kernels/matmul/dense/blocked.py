"""Few rows against a matrix on CPU, each form where XLA's own product is slow. Times are of two cores, 4096 x 4096.

`halves`, one float32 row: XLA runs it as one task on one core, which reads weights at half of the machine's rate. As a
batch of two products, over the halves of K (of N where the weight stands output by output), it is two tasks; the
halves are a reshape, no copy.

`sums`, a few float32 rows with a weight `[N, K]`, as the table of tied embeddings: written as a multiplication and a
sum over K, which XLA's CPU library fuses and works off row by row as the weight lies in memory (1.6 ms for 2 to 4 rows,
1.9 for 8, 2.5 for 16). As a product it repacks the weight (3.5 to 4.8 ms). Rows are padded to where it is fast. One
row alone takes another path there and twenty times as long; from 128 rows on the product is faster.

`wide`, bfloat16: with a bfloat16 result XLA widens the whole weight to float32 first (17 to 22 ms); with a float32
result it multiplies bfloat16 (2 to 7 ms), and the rounding comes after. A single row is given a second one of zeros.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.matmul.dense.call import Call

PARTS = 2
SMALLEST = 1 << 15  # weights; below this a product costs no more than handing it to another core
MOST_SUMS = 64  # rows
SUMS_MULTIPLE = 4  # of rows: two are fast as they are, others are padded


def halves_refuses(call: Call) -> str | None:
    """Why the product over halves of K does not serve, or None."""
    if call.inner % PARTS:
        return f"K must be a multiple of {PARTS}, got {call.inner}"
    return _one_row_refuses(call)


def halves_transposed_refuses(call: Call) -> str | None:
    """Why the product over halves of N does not serve, or None."""
    if call.outer % PARTS:
        return f"N must be a multiple of {PARTS}, got {call.outer}"
    return _one_row_refuses(call)


def _one_row_refuses(call: Call) -> str | None:
    if call.rows != 1:
        return f"it is for one row, got {call.rows}: more rows are shared among cores by themselves"
    if call.dtype != "float32":
        return f"it is for float32, got {call.dtype}"
    return _small(call)


def sums_refuses(call: Call) -> str | None:
    """Why the multiplication and sum does not serve, or None."""
    if not 2 <= call.rows <= MOST_SUMS:
        return f"it is for 2 to {MOST_SUMS} rows, got {call.rows}"
    if call.dtype != "float32":
        return f"it is for float32, got {call.dtype}"
    return _small(call)


def wide_refuses(call: Call) -> str | None:
    """Why the product summed in float32 does not serve, or None."""
    return None if call.dtype == "bfloat16" else f"it is for bfloat16, got {call.dtype}"


def _small(call: Call) -> str | None:
    if call.inner * call.outer < SMALLEST:
        return f"{call.inner} x {call.outer} weights are too few to share, it takes {SMALLEST} or more"
    return None


def dense_halves(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[K, N]` of one row as the sum of `PARTS` products."""
    halves = x.reshape(1, PARTS, call.inner // PARTS)
    cut = w.reshape(PARTS, call.inner // PARTS, call.outer)
    parts = lax.dot_general(halves, cut, (((2,), (1,)), ((1,), (0,))))
    return parts.sum(0).reshape(*x.shape[:-1], call.outer)


def transposed_halves(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[N, K].T` of one row as `PARTS` products with some of the outputs each."""
    cut = w.reshape(PARTS, call.outer // PARTS, call.inner)
    row = jnp.broadcast_to(x.reshape(1, -1), (PARTS, call.inner))
    return lax.dot_general(cut, row, (((2,), (1,)), ((0,), (0,)))).reshape(*x.shape[:-1], call.outer)


def transposed_sums(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[N, K].T` as one fused multiplication and sum."""
    flat = x.reshape(call.rows, call.inner)
    return summed_products(flat, w).reshape(*x.shape[:-1], call.outer)


@jax.custom_jvp
def summed_products(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[M, K]`, `w[N, K]` -> `[M, N]`, M from 2 on; its derivative is made of plain products."""
    m = x.shape[0]
    padded = jnp.pad(x, ((0, -m % SUMS_MULTIPLE if m > 2 else 0), (0, 0)))
    # Tied to its weight: the rows of two products, as of a gated MLP, are else repeated for all N outputs in an array
    # that both read, which is as large as M weights.
    padded, w = lax.optimization_barrier((padded, w))
    return (w[None, :, :] * padded[:, None, :]).sum(-1)[:m]


@summed_products.defjvp
def _summed_products_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return summed_products(x, w), dx @ w.T + x @ dw.T


def dense_wide(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[K, N]`, summed in float32 and rounded once."""
    return _wide(call, x, w, 0)


def transposed_wide(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., K] @ w[N, K].T`, summed in float32 and rounded once."""
    return _wide(call, x, w, 1)


def _wide(call: Call, x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    flat = x.reshape(call.rows, call.inner)
    padded = jnp.pad(flat, ((0, 1), (0, 0))) if call.rows == 1 else flat
    y = lax.dot_general(padded, w, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return y[: call.rows].astype(x.dtype).reshape(*x.shape[:-1], call.outer)


def dense_plain(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's own product."""
    return x @ w


def transposed_plain(call: Call, x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's own product with the transposed weight."""
    return jnp.einsum("...k,nk->...n", x, w)
