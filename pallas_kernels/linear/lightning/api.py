"""Lightning attention: causal linear attention in which every head forgets at its own constant pace.

    o_t = scale q_t S_t,        S_t = exp(log_decay) S_{t-1} + k_t^T v_t

Time and memory are linear in length, and a token of decoding costs one state, whatever came before. Qin et al.,
Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models, 2024 (arXiv
2401.04658). As in the paper there is no 1/sqrt(K): `scale` is 1 unless given. In TransNormerLLM, the paper's model,
log_decay is minus the ALiBi slope times (1 - l / (L - 1) + 1e-5) in layer l of L; other codes use other decays.

Stability: experimental.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.linear import arguments
from jaxinfer.pallas_kernels.linear.arguments import Call
from jaxinfer.pallas_kernels.linear.forms import differentiable, forms
from jaxinfer.pallas_kernels.linear.lightning import blocked, gpu, ref, tpu

Array = jax.Array
OP = "lightning"


def lightning(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    *,
    state: Array | None = None,
    lengths: Array | None = None,
    scale: float = 1.0,
    impl: str | None = None,
    block: int | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """q, k [B, H, T, K], v [B, H, T, V], log_decay f32 [H] -> out [B, H, T, V] and the final state f32 [B, H, K, V].

    q, k and v share a dtype (float32, bfloat16 or float16), which is out's; the state is float32. `log_decay` is the
    natural logarithm of a token's decay, at most 0. `state` is what came before (zeros if None). Of row b only the
    first `lengths[b]` tokens count: behind them out is 0 and the state stays. `impl` names a form (`ref`, `blocked`,
    `tpu`, `gpu`), `block` the tokens in a chunk. Differentiable in all arrays but `lengths`.

    Raises ArgumentError before tracing for ranks, sizes, dtypes and values that do not fit, and UnsupportedError
    where the form named cannot serve.
    """
    sizes = arguments.sequences(OP, q, k, v, state, lengths)
    _check_decay(OP, log_decay, sizes["H"])
    arguments.real(OP, scale=scale)
    check.positive(OP, block=block)
    call = Call.of(sizes, q.dtype, scale, block, interpret)
    k = arguments.keep_valid(k, lengths)
    full = jnp.full((sizes["B"],), sizes["T"], jnp.int32)
    count = full if lengths is None else jnp.asarray(lengths, jnp.int32)
    out, final = cast(
        tuple[Array, Array], _lightning(call, impl, (q, k, v, log_decay, count, arguments.initial(state, sizes)))
    )
    return arguments.keep_valid(out, lengths), final


def lightning_step(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array, *, scale: float = 1.0
) -> tuple[Array, Array]:
    """One token: q, k [B, H, K], v [B, H, V], log_decay f32 [H], state f32 [B, H, K, V] -> out [B, H, V], state.

    Bound by the state's bytes, which XLA reads and writes once; no kernel can do less. Raises as `lightning` does.
    """
    op = "lightning_step"
    sizes = arguments.token(op, q, k, v, state)
    _check_decay(op, log_decay, sizes["H"])
    arguments.real(op, scale=scale)
    return arguments.one_token(q, k, v, jnp.exp(log_decay)[:, None, None], state, scale)


def _check_decay(op: str, log_decay: Array, heads: int) -> None:
    check.shapes(op, log_decay=(log_decay, f"{heads}"))
    check.dtypes(op, ("float32",), log_decay=log_decay)
    if not isinstance(log_decay, Tracer | jax.ShapeDtypeStruct) and not (np.asarray(log_decay) <= 0).all():
        raise argument_error(op, "log_decay", np.asarray(log_decay).max(), "logarithms of decays, at most 0")


def _ref_backward(*arrays: Array, scale: float) -> tuple[Array, ...]:
    q, k, v, log_decay, lengths, state, *cotangents = arrays

    def run(q: Array, k: Array, v: Array, log_decay: Array, state: Array) -> tuple[Array, Array]:
        return ref.recurrent(q, k, v, log_decay, lengths, state, scale=scale)

    return jax.vjp(run, q, k, v, log_decay, state)[1](tuple(cotangents))


def _none_for_lengths(found: tuple[Array, ...]) -> tuple[Array | None, ...]:
    *gradients, d_state = found
    return (*gradients, None, d_state)


FORWARD = forms(gpu=gpu.forward, tpu=tpu.forward, blocked=blocked.forward, ref=ref.recurrent)
BACKWARD = forms(gpu=gpu.backward, tpu=tpu.backward, blocked=blocked.backward, ref=_ref_backward)
_lightning = differentiable(OP, FORWARD, BACKWARD, _none_for_lengths)
