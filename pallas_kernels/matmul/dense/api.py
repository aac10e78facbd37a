"""`dense`: a product with float weights that picks its form by the number of rows and the platform.

Stability: experimental.
"""

import math

import jax

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels.matmul.dense.blocked import dense_plain, dense_split, split_refuses
from jaxinfer.pallas_kernels.matmul.dense.ref import dense_ref

FORMS = (
    Form("split", dense_split, "cpu", split_refuses),
    Form("plain", dense_plain),
    Form("ref", dense_ref, automatic=False),
)


def dense(x: jax.Array, w: jax.Array, *, impl: str | None = None) -> jax.Array:
    """`x[..., K] @ w[K, N] -> [..., N]`, both float32, bfloat16 or float16.

    `impl`: "split" (one row, CPU), "plain" (XLA's product), "ref", or None for what is fastest where the program will
    run. Differentiable. Raises ArgumentError for ranks, sizes or dtypes that do not fit, UnsupportedError for an
    `impl` that cannot serve.
    """
    letters = " ".join(f"B{i}" for i in range(max(x.ndim - 1, 0)))
    sizes = check.shapes("dense", x=(x, f"{letters} K"), w=(w, "K N"))
    dtype = check.dtypes("dense", x=x, w=w)
    call = (math.prod(x.shape[:-1]), sizes["K"], sizes["N"], dtype)
    if impl is None and jax.local_device_count() > 1:
        impl = "plain"  # several CPU devices share the cores already, and a sharded K would be reduced twice
    return dispatch("dense", FORMS, call, x, w, impl=impl)
