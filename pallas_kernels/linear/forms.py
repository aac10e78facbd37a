"""The forms of a linear attention op and its gradient, from the op's four modules: one table and one rule for both ops.

Stability: internal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch
from jaxinfer.pallas_kernels.linear import gpu as shared_gpu
from jaxinfer.pallas_kernels.linear import tpu as shared_tpu

Arrays = tuple[jax.Array, ...]
Kernel = Callable[..., Arrays]


def forms(*, gpu: Kernel, tpu: Kernel, blocked: Kernel, ref: Kernel) -> tuple[Form, ...]:
    """In order of preference; each is `(*arrays, **what it takes of a Call) -> arrays`, forward or backward."""
    return (
        Form(
            "gpu",
            lambda call, *x: gpu(*x, scale=call.scale, interpret=call.interpret),
            platform="cuda",
            refuses=shared_gpu.refuses,
        ),
        Form("tpu", lambda call, *x: tpu(*x, **call.options), platform="tpu", refuses=shared_tpu.refuses),
        Form("blocked", lambda call, *x: blocked(*x, scale=call.scale, block=call.block)),
        Form("ref", lambda call, *x: ref(*x, scale=call.scale), automatic=False),
    )


def differentiable(
    op: str, forward: tuple[Form, ...], backward: tuple[Form, ...], gradients: Callable[[Any], tuple] = tuple
) -> Callable[..., Any]:
    """`(call, impl, arrays) -> (out, state)` whose gradient runs the form of the same name on arrays and cotangents;
    `gradients` puts what that gives in the arrays' order, None where there is no gradient."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def run(call: Any, impl: str | None, arrays: Arrays) -> Any:
        return dispatch(op, forward, call, *arrays, impl=impl)

    def save(call: Any, impl: str | None, arrays: Arrays) -> Any:
        return run(call, impl, arrays), arrays

    def differentiate(call: Any, impl: str | None, arrays: Arrays, cotangents: Arrays) -> Any:
        return (gradients(dispatch(f"{op} backward", backward, call, *arrays, *cotangents, impl=impl)),)

    run.defvjp(save, differentiate)
    return run
