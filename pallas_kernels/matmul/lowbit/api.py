"""Weight-only products: float activations by weights of 2 to 8 bits, integers and floats, grouped scales and zeros.

    y = lowbit_matmul(x, weight)          # x[M, K] float32 or bfloat16, M from 1 to thousands; weight: a LowBit

Every format of `matmul/elements.py` and every group size comes through this one door. Sources of the formats: see
there; of the layout, `_core/packing.py`. The gradient of x is a product with the same packed weight; that of float
scales is exact too and, only where it is asked for, makes the dense gradient of the weight.

Stability: experimental.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels.matmul.call import Call, checked_call
from jaxinfer.pallas_kernels.matmul.lowbit import blocked, digits, gpu, tpu
from jaxinfer.pallas_kernels.matmul.lowbit.ref import lowbit_ref
from jaxinfer.pallas_kernels.matmul.weight import LowBit, dequantize


def lowbit_matmul(
    x: jax.Array, weight: LowBit, *, impl: str | None = None, block: int | None = None, interpret: bool = False
) -> jax.Array:
    """`x[M, K]`, `weight` of K inputs and N outputs -> `[M, N]` in the dtype of x.

    Sums are float32. `impl`: "ref", "blocked", "digits" (CPU: few rows, one group), "tpu", "gpu" or None for what fits
    the platform; `block`: outputs at a time, where a form has blocks; `interpret` runs the TPU form on any machine.
    Raises ArgumentError for arrays that do not fit each other, UnsupportedError for an `impl` that cannot serve.
    """
    call = checked_call("lowbit_matmul", x, weight, block=block, interpret=interpret)
    return _differentiable(call, impl, x, weight)


def lowbit_matmul_across(y: jax.Array, weight: LowBit, *, block: int | None = None) -> jax.Array:
    """`y[M, N]` summed over the weight's outputs -> `[M, K]`: the product with the transposed weight, in XLA."""
    check.shapes("lowbit_matmul_across", y=(y, f"M {weight.outputs}"))
    check.dtypes("lowbit_matmul_across", y=y)
    check.positive("lowbit_matmul_across", block=block)
    return blocked.product_across(y, weight, block)


def _ref(call: Call, x: jax.Array, w: LowBit) -> jax.Array:
    return lowbit_ref(x, w).astype(x.dtype)


def _blocked(call: Call, x: jax.Array, w: LowBit) -> jax.Array:
    return blocked.product(x, w, call.block)


FORMS = (
    Form("tpu", tpu.product, platform="tpu", refuses=tpu.refuses),
    Form("gpu", gpu.product, platform="cuda", refuses=gpu.refuses),
    Form("digits", digits.product, platform="cpu", refuses=digits.refuses),
    Form("blocked", _blocked),
    Form("ref", _ref, automatic=False),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(call: Call, impl: str | None, x: jax.Array, w: LowBit) -> jax.Array:
    return dispatch("lowbit_matmul", FORMS, call, x, w, impl=impl)


def _forward(call: Call, impl: str | None, x: jax.Array, w: LowBit):
    return _differentiable(call, impl, x, w), (x, w)


def _backward(call: Call, impl: str | None, saved, g: jax.Array):
    x, w = saved
    return cotangents(x, w, g, call.block)


def cotangents(x: jax.Array, w: LowBit, g: jax.Array, block: int | None = None) -> tuple[jax.Array, LowBit]:
    """Gradients of `x` and of the weight's float scales for the cotangent `g[M, N]`.

    The second makes the dense gradient of the weight; the compiler drops it unless scales are trained.
    """
    of_weight = g.astype(jnp.float32).T @ x.astype(jnp.float32)
    return blocked.product_across(g, w, block), *jax.vjp(dequantize, w)[1](of_weight)


_differentiable.defvjp(_forward, _backward)
