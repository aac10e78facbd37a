"""FlashAttention by cuDNN, through the call that `jax.nn.dot_product_attention(implementation="cudnn")` makes.

That public function returns the log-sum-exp in the arrays' own dtype, and a bfloat16 log-sum-exp cannot merge parts, so
the call beneath it is used, which keeps float32. cuDNN's derivative leaves out what flows back through the
log-sum-exp: where something does, this form does not serve. Not run on a GPU yet.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxinfer.pallas_kernels.attention.flash.call import Call


def refuses(call: Call) -> str | None:
    """Why cuDNN cannot serve, or None."""
    rules = call.rules
    if call.dtype == "float32":
        return "cuDNN's flash attention takes bfloat16 and float16, not float32"
    if call.dim != call.value_dim or call.dim % 8 or call.dim > 128:
        return f"head sizes {call.dim} and {call.value_dim} are not one multiple of 8 up to 128"
    if call.ragged or call.alibi or rules.softcap is not None or call.block or call.interpret:
        return "ragged rows, ALiBi, soft-capping, block sizes and the interpreter are not passed to cuDNN"
    if rules.causal and call.queries != call.keys:
        return "cuDNN aligns the first query with the first key, not the last with the last"
    if rules.window is not None and not rules.causal:
        return "cuDNN's window looks back only"
    if call.lse_cotangent:
        return "cuDNN has no derivative of the log-sum-exp"
    return _absent()


def forward(call: Call, q, k, v, *rest) -> tuple[jax.Array, jax.Array]:
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    return _attend(call, q, k, v)


def backward(call: Call, q, k, v, q_lengths, kv_lengths, slopes, out, lse, dout, dlse) -> Any:
    """`(dq, dk, dv)`; cuDNN runs its forward pass again for what its backward pass wants to find."""
    _, pull = jax.vjp(lambda q, k, v: _attend(call, q, k, v), q, k, v)
    return pull((dout, dlse))


def _attend(call: Call, q, k, v) -> tuple[jax.Array, jax.Array]:
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    mask = MaskType.CAUSAL if call.rules.causal else MaskType.NO_MASK
    both: Any = dot_product_attention(
        q, k, v, scale=call.rules.scale, mask_type=mask, qkv_layout="BNTH",
        sliding_window_length=call.rules.window, return_residual=True,
    )  # fmt: skip
    return both


def _absent() -> str | None:
    """Why there is no cuDNN here, or None."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

        check_cudnn_version()
    except (ImportError, RuntimeError) as error:
        return f"no cuDNN here: {error}"
    return None
