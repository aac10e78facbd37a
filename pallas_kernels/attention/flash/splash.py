"""Flash attention on the TPU by jax's own splash attention, `jax.experimental.pallas.ops.tpu.splash_attention`.

It skips the blocks that a causal mask or a window hides and returns the log-sum-exp. It takes no scale, so queries are
scaled before and rounded to their dtype once more. Where it is asked for the log-sum-exp it has no derivative: the
backward pass here runs its forward pass again, which our own kernels need not. Not run on a TPU yet.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.flash.call import Call

LANES = 128
SIZES = (1024, 512, 256, LANES)  # of blocks, the best first: larger ones fetch less, and all fit VMEM to heads of 256


def refuses(call: Call) -> str | None:
    """Why splash attention cannot serve, or None."""
    rules = call.rules
    if call.dtype != "bfloat16":
        return f"splash attention multiplies at bfloat16's precision, the arrays are {call.dtype}"
    if call.ragged or call.alibi or call.block:
        return "ragged rows, ALiBi and block sizes are not passed to splash attention"
    if call.queries % LANES or call.keys % LANES:
        return f"{call.queries} queries and {call.keys} keys are not multiples of {LANES}"
    if call.dim != call.value_dim or call.dim % 64 or call.dim > 256:
        return f"head sizes {call.dim} and {call.value_dim} are not one multiple of 64 up to 256"
    if (rules.causal or rules.window is not None) and call.queries > call.keys:
        return "the first of more queries than keys see nothing, and splash attention gives such rows no empty result"
    if call.lse_cotangent:
        return "splash attention has no derivative of the log-sum-exp"
    return None


def forward(call: Call, q, k, v, *rest) -> tuple[jax.Array, jax.Array]:
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    # A bfloat16 product in a TPU kernel cannot be told to be more precise, so a default that asks for it stays outside.
    with jax.default_matmul_precision("default"):
        out, (lse,) = jax.vmap(_kernel(call, save_residuals=True))(_scaled(call, q), k, v)
    return out, lse


def backward(call: Call, q, k, v, q_lengths, kv_lengths, slopes, out, lse, dout, dlse) -> Any:
    """`(dq, dk, dv)`."""
    with jax.default_matmul_precision("default"):
        kernel = jax.vmap(_kernel(call, save_residuals=False))
        _, pull = jax.vjp(lambda q, k, v: kernel(_scaled(call, q), k, v), q, k, v)
        return pull(dout.astype(v.dtype))


def _scaled(call: Call, q: jax.Array) -> jax.Array:
    return (q.astype(jnp.float32) * call.rules.scale).astype(q.dtype)


def _kernel(call: Call, save_residuals: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, offset = (call.queries, call.keys), call.keys - call.queries
    causal, window = call.rules.causal, call.rules.window
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0 if causal else window - 1), offset)
    else:
        mask = splash.CausalMask(shape, offset) if causal else splash.FullMask(shape)
    rows, keys = (next(size for size in SIZES if n % size == 0) for n in shape)
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=keys, block_kv_compute=min(keys, 512),
        block_q_dkv=min(rows, 512), block_kv_dkv=min(keys, 512), block_kv_dkv_compute=min(keys, 512),
        block_q_dq=min(rows, 512), block_kv_dq=min(keys, 512),
    )  # fmt: skip
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * call.heads), block_sizes=sizes, save_residuals=save_residuals,
        attn_logits_soft_cap=call.rules.softcap, interpret=call.interpret,
    )  # fmt: skip
