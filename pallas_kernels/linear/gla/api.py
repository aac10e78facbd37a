"""Gated linear attention: causal linear attention in which every channel forgets as much as each token says.

    o_t = scale q_t S_t,        S_t = diag(exp(log_gate_t)) S_{t-1} + k_t^T v_t

Time and memory are linear in length, and a token of decoding costs one state, whatever came before. Yang et al., Gated
Linear Attention Transformers with Hardware-Efficient Training, 2023 (arXiv 2312.06635). `scale` is 1/sqrt(K) unless
given. In the paper's layer log_gate is logsigmoid(x W1 W2 + b) / 16.

Stability: experimental.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.linear import arguments
from jaxinfer.pallas_kernels.linear.arguments import Call
from jaxinfer.pallas_kernels.linear.forms import differentiable, forms
from jaxinfer.pallas_kernels.linear.gla import blocked, gpu, ref, tpu

Array = jax.Array
OP = "gla"


def gla(
    q: Array,
    k: Array,
    v: Array,
    log_gate: Array,
    *,
    state: Array | None = None,
    lengths: Array | None = None,
    scale: float | None = None,
    impl: str | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """q, k [B, H, T, K], v [B, H, T, V], log_gate [B, H, T, K] -> out [B, H, T, V], the final state f32 [B, H, K, V].

    q, k and v share a dtype (float32, bfloat16 or float16), which is out's; the state is float32. `log_gate` (that
    dtype or float32) is the natural logarithm of each channel's decay, at most 0 and down to -inf. `state` is what came
    before (zeros if None). Of row b only the first `lengths[b]` tokens count: behind them out is 0 and the state stays.
    `impl` names a form (`ref`, `blocked`, `tpu`, `gpu`), `block` the tokens in a chunk. Differentiable in
    all arrays but `lengths`.

    Raises ArgumentError before tracing for ranks, sizes, dtypes and values that do not fit, and UnsupportedError
    where the form named cannot serve.
    """
    sizes = arguments.sequences(OP, q, k, v, state, lengths)
    _check_gate(OP, log_gate, "B H T K", q)
    arguments.real(OP, scale=scale or 0)
    factor = sizes["K"] ** -0.5 if scale is None else float(scale)
    check.positive(OP, block=block)
    call = Call.of(sizes, q.dtype, factor, block, interpret)
    k, log_gate = arguments.keep_valid(k, lengths), arguments.keep_valid(log_gate, lengths)
    out, final = cast(tuple[Array, Array], _gla(call, impl, (q, k, v, log_gate, arguments.initial(state, sizes))))
    return arguments.keep_valid(out, lengths), final


def gla_step(
    q: Array, k: Array, v: Array, log_gate: Array, state: Array, *, scale: float | None = None
) -> tuple[Array, Array]:
    """One token: q, k [B, H, K], v [B, H, V], log_gate [B, H, K], state f32 [B, H, K, V] -> out, state.

    Bound by the state's bytes, which XLA reads and writes once; no kernel can do less. Raises as `gla` does.
    """
    op = "gla_step"
    sizes = arguments.token(op, q, k, v, state)
    _check_gate(op, log_gate, "B H K", q)
    arguments.real(op, scale=scale or 0)
    factor = sizes["K"] ** -0.5 if scale is None else float(scale)
    return arguments.one_token(q, k, v, jnp.exp(log_gate.astype(jnp.float32))[..., None], state, factor)


def _check_gate(op: str, log_gate: Array, pattern: str, q: Array) -> None:
    check.shapes(op, q=(q, pattern), log_gate=(log_gate, pattern))
    check.dtypes(op, ("float32", str(q.dtype)), log_gate=log_gate)
    if not isinstance(log_gate, Tracer | jax.ShapeDtypeStruct) and not bool((log_gate <= 0).all()):
        raise argument_error(op, "log_gate", float(log_gate.max()), "logarithms of decays, at most 0")


def _ref_backward(*arrays: Array, scale: float) -> tuple[Array, ...]:
    *primals, d_out, d_state = arrays
    return jax.vjp(functools.partial(ref.recurrent, scale=scale), *primals)[1]((d_out, d_state))


FORWARD = forms(gpu=gpu.forward, tpu=tpu.forward, blocked=blocked.forward, ref=ref.recurrent)
BACKWARD = forms(gpu=gpu.backward, tpu=tpu.backward, blocked=blocked.backward, ref=_ref_backward)
_gla = differentiable(OP, FORWARD, BACKWARD)
