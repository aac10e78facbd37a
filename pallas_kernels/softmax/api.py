"""The Two-Pass Softmax: two reads of the input instead of three, since e^x is summed as mantissa and exponent.

Dukhan & Ablavatski, The Two-Pass Softmax Algorithm, 2020 (arXiv 2001.04438). The usual form reads its input for the
maximum, for the sum and for the output, because e^x overflows float32 from x = 89 on. A pair of floats, e^x = m 2^n,
does not, so the pass for the maximum falls away. That pays where rows are too long for the cache.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.softmax import blocked, gpu, ref, tpu

Array = jax.Array
OP = "softmax"


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    rows: int
    length: int
    dtype: str
    block: int | None
    interpret: bool


def softmax(
    x: Array, *, axis: int = -1, impl: str | None = None, block: int | None = None, interpret: bool = False
) -> Array:
    """Softmax of x (float32, bfloat16 or float16) over `axis`, computed in float32, in x's shape and dtype.

    An entry of -inf has probability 0 and a row of nothing else is all zeros; a NaN makes its row NaN. Other entries
    beyond +-2^23, +inf too, count as +-2^23. `impl` names a form (`ref`, `usual`, `blocked`, `tpu`, `gpu`), `block` the
    entries of a row worked on at a time (the forms `blocked` and `tpu`). Differentiable, once.

    Raises ArgumentError before tracing for what does not fit, UnsupportedError where the form named cannot serve.
    """
    if not hasattr(x, "ndim") or x.ndim == 0 or x.size == 0:
        raise argument_error(OP, "x", getattr(x, "shape", type(x).__name__), "an array of at least one axis and entry")
    check.dtypes(OP, x=x)
    if type(axis) is not int or not -x.ndim <= axis < x.ndim:
        raise argument_error(OP, "axis", repr(axis), f"-{x.ndim} to {x.ndim - 1}")
    check.positive(OP, block=block)
    moved = jnp.moveaxis(x, axis, -1)
    flat = moved.reshape(-1, moved.shape[-1])
    call = Call(flat.shape[0], flat.shape[1], str(x.dtype), block, interpret)
    out = cast(Array, _softmax(call, impl, flat))
    return jnp.moveaxis(out.reshape(moved.shape), -1, axis)


# On a GPU that no kernel serves, XLA's own fusions beat the loop over lanes of `blocked`.
FORWARD = (
    Form(
        "tpu",
        lambda call, x: tpu.forward(x, block=call.block, interpret=call.interpret),
        platform="tpu",
        refuses=tpu.refuses,
    ),
    Form("gpu", lambda call, x: gpu.forward(x, interpret=call.interpret), platform="cuda", refuses=gpu.refuses),
    Form("usual", lambda call, x: ref.softmax(x), platform="cuda"),
    Form("blocked", lambda call, x: blocked.forward(x, block=call.block)),
    Form("ref", lambda call, x: ref.softmax(x), automatic=False),
)
BACKWARD = (
    Form(
        "tpu",
        lambda call, y, d: tpu.backward(y, d, block=call.block, interpret=call.interpret),
        platform="tpu",
        refuses=tpu.refuses,
    ),
    Form("gpu", lambda call, y, d: gpu.backward(y, d, interpret=call.interpret), platform="cuda", refuses=gpu.refuses),
    Form("usual", lambda call, y, d: blocked.backward_fused(y, d), platform="cuda"),
    Form("blocked", lambda call, y, d: blocked.backward(y, d)),
    Form("ref", lambda call, y, d: blocked.backward_fused(y, d), automatic=False),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(call: Call, impl: str | None, x: Array) -> Any:
    return dispatch(OP, FORWARD, call, x, impl=impl)


def _save(call: Call, impl: str | None, x: Array) -> Any:
    out = _softmax(call, impl, x)
    return out, out


def _grad(call: Call, impl: str | None, out: Array, d_out: Array) -> tuple[Array]:
    return (cast(Array, dispatch(f"{OP} backward", BACKWARD, call, out, d_out, impl=impl)),)


_softmax.defvjp(_save, _grad)
