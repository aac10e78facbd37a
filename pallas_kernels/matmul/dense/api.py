"""Products with float weights that pick their form by the number of rows, the dtype and the platform.

    y = dense(x, w)               # x[..., K] @ w[K, N]
    y = dense_transposed(x, w)    # x[..., K] @ w[N, K].T: a weight that stands output by output, as tied embeddings do

Stability: experimental.
"""

from __future__ import annotations

import math

import jax

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels.matmul.dense import blocked, ref
from jaxinfer.pallas_kernels.matmul.dense.call import Call

FORMS = (
    Form("halves", blocked.dense_halves, "cpu", blocked.halves_refuses),
    Form("wide", blocked.dense_wide, "cpu", blocked.wide_refuses),
    Form("plain", blocked.dense_plain),
    Form("ref", ref.dense_ref, automatic=False),
)
TRANSPOSED_FORMS = (
    Form("halves", blocked.transposed_halves, "cpu", blocked.halves_transposed_refuses),
    Form("sums", blocked.transposed_sums, "cpu", blocked.sums_refuses),
    Form("wide", blocked.transposed_wide, "cpu", blocked.wide_refuses),
    Form("plain", blocked.transposed_plain),
    Form("ref", ref.transposed_ref, automatic=False),
)


def dense(x: jax.Array, w: jax.Array, *, impl: str | None = None) -> jax.Array:
    """`x[..., K] @ w[K, N] -> [..., N]`, both float32, bfloat16, float16 or float64.

    `impl`: "halves" (one float32 row, CPU), "wide" (bfloat16, CPU), "plain" (XLA's product), "ref", or None for what is
    fastest where the program will run. Differentiable. Raises ArgumentError for ranks, sizes or dtypes that do not fit,
    UnsupportedError for an `impl` that cannot serve.
    """
    call = _call("dense", x, w, "K N")
    return dispatch("dense", FORMS, call, x, w, impl=impl or _shared(call))


def dense_transposed(x: jax.Array, w: jax.Array, *, impl: str | None = None) -> jax.Array:
    """`x[..., K] @ w[N, K].T -> [..., N]`, both float32, bfloat16, float16 or float64.

    `impl`: "halves", "sums" (2 to 64 float32 rows, CPU), "wide", "plain", "ref" or None, as for `dense`; so are the
    errors.
    """
    call = _call("dense_transposed", x, w, "N K")
    return dispatch("dense_transposed", TRANSPOSED_FORMS, call, x, w, impl=impl or _shared(call))


def _call(op: str, x: jax.Array, w: jax.Array, pattern: str) -> Call:
    letters = " ".join(f"B{i}" for i in range(max(x.ndim - 1, 0)))
    sizes = check.shapes(op, x=(x, f"{letters} K"), w=(w, pattern))
    dtype = check.dtypes(op, (*check.FLOATS, "float64"), x=x, w=w)
    return Call(math.prod(x.shape[:-1]), sizes["K"], sizes["N"], dtype)


def _shared(call: Call) -> str | None:
    """Several CPU devices share the cores already, and a sharded axis would be cut twice: XLA's product then."""
    return "plain" if call.dtype == "float32" and jax.local_device_count() > 1 else None
