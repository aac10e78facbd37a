"""Products of activations rounded to 8 bits row by row: int8 with integer weights, e4m3 with float8 ones.

    y = int8_matmul(x, weight)            # W8A8, W4A8, W3A8, W2A8, and e2m1 (whose values are multiples of 1/2)
    y = float8_matmul(x, weight)          # weights of e4m3 or e5m2

Each group of inputs is summed by itself, in integers exactly, and its sum is dequantized once: by the weight's scale
and the row's. `per_group` gives x a scale for each of the weight's groups as well, which with e4m3 in blocks of 128 is
DeepSeek-V3's recipe.
Sources: Dettmers et al. 2022, LLM.int8(), 2208.07339; Zheng et al. 2024, MixPE, 2411.16158 (dequantize after the sum of
a group); Zheng et al. 2024, MixLLM, 2412.14590 (int8 activations a group, two steps of dequantization); Micikevicius et
al. 2022, FP8 formats for deep learning, 2209.05433; DeepSeek-AI 2024, DeepSeek-V3, 2412.19437 (float8 in blocks).
The gradient of x is that of the product with the weight as it stands, straight through the rounding of x.

Stability: experimental.
"""

from __future__ import annotations

import functools

import jax

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels.matmul.acts8 import blocked, gpu, tensor_cores, tpu
from jaxinfer.pallas_kernels.matmul.acts8.ref import rounded_ref
from jaxinfer.pallas_kernels.matmul.call import Call, checked_call
from jaxinfer.pallas_kernels.matmul.lowbit.api import cotangents
from jaxinfer.pallas_kernels.matmul.sums8 import FITTING
from jaxinfer.pallas_kernels.matmul.weight import LowBit

FLOAT8 = ("e4m3", "e5m2")


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

    `impl`: "ref", "blocked", "tpu", "gpu" (Hopper) or None for what fits the platform; `interpret` runs those two on
    any machine. Raises ArgumentError for arrays that do not fit each other and for elements whose values are no small
    integers, UnsupportedError for an `impl` that cannot serve.
    """
    return _matmul("int8_matmul", "int8", FITTING, x, weight, per_group, impl, block, interpret)


def float8_matmul(
    x: jax.Array,
    weight: LowBit,
    *,
    per_group: bool = False,
    impl: str | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `int8_matmul`, for a weight of e4m3 or e5m2: x is rounded to e4m3, sums are float32.

    `impl` may also be "tensor_cores", XLA's float8 product on GPUs that have it. Elsewhere the rounded x meets the
    weight in a float product.
    """
    return _matmul("float8_matmul", "e4m3", FLOAT8, x, weight, per_group, impl, block, interpret)


def _matmul(op, activations, elements, x, weight, per_group, impl, block, interpret) -> jax.Array:
    call = checked_call(op, x, weight, block=block, interpret=interpret, per_group=per_group, activations=activations)
    check.choice(op, "element", weight.element, elements)
    return _differentiable(call, impl, x, weight)


def _ref(call: Call, x: jax.Array, w: LowBit) -> jax.Array:
    return rounded_ref(x, w, call.activations, call.per_group).astype(x.dtype)


FORMS = (
    Form("tpu", tpu.product, platform="tpu", refuses=tpu.refuses),
    Form("tensor_cores", tensor_cores.product, platform="cuda", refuses=tensor_cores.refuses),
    Form("gpu", gpu.product, platform="cuda", refuses=gpu.refuses),
    Form("blocked", blocked.product),
    Form("ref", _ref, automatic=False),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(call: Call, impl: str | None, x: jax.Array, w: LowBit) -> jax.Array:
    return dispatch(f"{'int8' if call.activations == 'int8' else 'float8'}_matmul", FORMS, call, x, w, impl=impl)


def _forward(call: Call, impl: str | None, x: jax.Array, w: LowBit):
    return _differentiable(call, impl, x, w), (x, w)


def _backward(call: Call, impl: str | None, saved, g: jax.Array):
    x, w = saved
    return cotangents(x, w, g)


_differentiable.defvjp(_forward, _backward)
