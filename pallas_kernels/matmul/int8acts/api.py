"""Integer products: activations rounded to int8 row by row, weights of 8 bits or fewer, sums in int32.

    y = int8_matmul(x, weight)            # W8A8, W4A8, W3A8, W2A8, and e2m1 (whose values are multiples of 1/2)

Each group of inputs is summed in integers, which is exact, and its sum is dequantized once: by the weight's scale and
the row's. `per_group` gives x a scale for each of the weight's groups as well.
Sources: Dettmers et al. 2022, LLM.int8(), 2208.07339; Zheng et al. 2024, MixPE, 2411.16158 (dequantize after the sum of
a group); Zheng et al. 2024, MixLLM, 2412.14590 (int8 activations a group, two steps of dequantization).
The gradient of x is that of the product with the weight as it stands, straight through the rounding of x.

Stability: experimental.
"""

from __future__ import annotations

import functools

import jax

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels.matmul.call import Call, checked_call
from jaxinfer.pallas_kernels.matmul.int8acts import blocked
from jaxinfer.pallas_kernels.matmul.int8acts.ref import int8_ref
from jaxinfer.pallas_kernels.matmul.lowbit.api import cotangents
from jaxinfer.pallas_kernels.matmul.sums8 import FITTING
from jaxinfer.pallas_kernels.matmul.weight import LowBit


def int8_matmul(
    x: jax.Array,
    weight: LowBit,
    *,
    per_group: bool = False,
    impl: str | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`x[M, K]` float, `weight` of K inputs and N outputs -> `[M, N]` in the dtype of x.

    `impl`: "ref", "blocked" or None for what fits the platform. Raises ArgumentError for arrays that do not fit
    each other and for elements whose values are no small integers, UnsupportedError for an `impl` that cannot serve.
    """
    call = checked_call("int8_matmul", x, weight, block=block, interpret=interpret, per_group=per_group)
    check.choice("int8_matmul", "element", weight.element, FITTING)
    return _differentiable(call, impl, x, weight)


def _ref(call: Call, x: jax.Array, w: LowBit) -> jax.Array:
    return int8_ref(x, w, call.per_group).astype(x.dtype)


def _blocked(call: Call, x: jax.Array, w: LowBit) -> jax.Array:
    return blocked.product(x, w, call.per_group)


FORMS = (
    Form("blocked", _blocked),
    Form("ref", _ref, automatic=False),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(call: Call, impl: str | None, x: jax.Array, w: LowBit) -> jax.Array:
    return dispatch("int8_matmul", FORMS, call, x, w, impl=impl)


def _forward(call: Call, impl: str | None, x: jax.Array, w: LowBit):
    return _differentiable(call, impl, x, w), (x, w)


def _backward(call: Call, impl: str | None, saved, g: jax.Array):
    x, w = saved
    return cotangents(x, w, g)


_differentiable.defvjp(_forward, _backward)
