"""`flash`: exact attention of many queries, forward and backward, in memory linear in the lengths.

Dao, Fu, Ermon, Rudra and Re (2022), "FlashAttention", arXiv 2205.14135; Dao (2023), "FlashAttention-2", arXiv
2307.08691.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.dispatch import Form, dispatch, named
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.attention.flash import blocked, cudnn, gpu, ref, splash, tpu
from jaxinfer.pallas_kernels.attention.flash.call import Call
from jaxinfer.pallas_kernels.attention.flash.scores import Rules


def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    slopes: jax.Array | None = None,
    scale: float | None = None,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    impl: str | None = None,
    block: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of `q[B, H, T, d]` over `k[B, G, S, d]` and `v[B, G, S, e]`: `(out[B, H, T, e], lse f32[B, H, T])`.

    Query head h reads key head h // (H / G). `lse` is the natural log-sum-exp of the scores; a row that sees no key has
    lse = -inf and out = 0. All three arrays are float32, bfloat16 or float16; products accumulate in float32.

    `q_lengths, kv_lengths i32[B]`: the real queries and keys of each row; what lies behind them is not seen, and such
    queries are empty rows. Queries align with the end of the keys: query i is at position i + keys - queries.
    `causal`: keys at later positions are not seen. `window`: only keys closer than this are seen.
    `scale`: of q k, by default 1 / sqrt(d). `softcap`: scores become softcap * tanh(score / softcap).
    `slopes f32[H]` (ALiBi): scores are lowered by slope * |distance|; slopes are constants and get no gradient.

    `impl`: "ref", "blocked", ... instead of the form that fits where it runs. `block`: rows of queries and of keys of a
    block. `interpret`: run the TPU form (or `impl`) in Pallas' interpreter. Differentiable once in q, k, v through both
    results. Raises ArgumentError naming the argument, and UnsupportedError where `impl` cannot serve.
    """
    call = checked("flash", q, k, v, causal, window, softcap, slopes, scale, q_lengths, kv_lengths, block, interpret)
    if impl is None and interpret:
        impl = "tpu"
    if impl is not None:
        named("flash", FORWARD, impl)
    q_lengths, kv_lengths = both_lengths(call, q_lengths, kv_lengths)
    return _flash(call, impl, q, k, v, q_lengths, kv_lengths, slopes)


def checked(op: str, q, k, v, causal, window, softcap, slopes, scale, q_lengths, kv_lengths, block, interpret) -> Call:
    """Refuse what no form of `op` takes, and return the static side of the call; `block_sparse` has it too."""
    size = check.shapes(op, q=(q, "B H T d"), k=(k, "B G S d"), v=(v, "B G S e"))
    dtype = check.dtypes(op, q=q, k=k, v=v)
    if not all(size.values()):
        raise argument_error(op, "q, k, v", f"an empty array among {size}", "sizes of at least 1")
    if size["H"] % size["G"]:
        raise argument_error(op, "k", f"{size['G']} heads", f"a number that divides the {size['H']} heads of q")
    check.positive(op, window=window)
    for name, number in (("softcap", softcap), ("scale", scale)):
        if number is not None and not (isinstance(number, int | float) and 0 < number < math.inf):
            raise argument_error(op, name, repr(number), "a positive number or None")
    for name, lengths, most in (("q_lengths", q_lengths, "T"), ("kv_lengths", kv_lengths, "S")):
        if lengths is not None:
            check.shapes(op, **{name: (lengths, str(size["B"]))})
            check.integers(op, **{name: lengths})
            check.within(op, 0, size[most], **{name: lengths})
    if slopes is not None:
        check.shapes(op, slopes=(slopes, str(size["H"])))
    if block is not None and not (
        isinstance(block, tuple) and [type(b) for b in block] == [int] * 2 and min(block) > 0
    ):
        raise argument_error(op, "block", repr(block), "(rows of queries, rows of keys) or None")
    return Call(
        rules=Rules(scale or 1 / math.sqrt(size["d"]), bool(causal), window, softcap),
        batch=size["B"],
        heads=size["H"],
        kv_heads=size["G"],
        queries=size["T"],
        keys=size["S"],
        dim=size["d"],
        value_dim=size["e"],
        dtype=dtype,
        ragged=q_lengths is not None or kv_lengths is not None,
        alibi=slopes is not None,
        block=block,
        interpret=interpret,
    )


def both_lengths(call: Call, q_lengths, kv_lengths) -> tuple[jax.Array | None, jax.Array | None]:
    """Both as i32[B] where either is given, else neither."""
    if not call.ragged:
        return None, None
    q_lengths = jnp.full(call.batch, call.queries) if q_lengths is None else jnp.asarray(q_lengths)
    kv_lengths = jnp.full(call.batch, call.keys) if kv_lengths is None else jnp.asarray(kv_lengths)
    return q_lengths.astype(jnp.int32), kv_lengths.astype(jnp.int32)


def _ref_backward(call: Call, q, k, v, q_lengths, kv_lengths, slopes, out, lse, dout, dlse) -> Any:
    """jax's own derivative of the oracle."""
    _, pull = jax.vjp(lambda q, k, v: ref.forward(call, q, k, v, q_lengths, kv_lengths, slopes), q, k, v)
    return pull((dout, dlse))


# On a TPU jax's kernel comes first where it serves: models are trained with it, and ours have not run on one. Backward
# ours come first: they start from the results that are there, and splash attention runs forward again for its own.
# tokamax is not among them: its public function gives no log-sum-exp.
FORWARD = (
    Form("splash", splash.forward, platform="tpu", refuses=splash.refuses),
    Form("tpu", tpu.forward, platform="tpu", refuses=tpu.refuses),
    Form("cudnn", cudnn.forward, platform="cuda", refuses=cudnn.refuses),
    Form("gpu", gpu.forward, platform="cuda", refuses=gpu.refuses),
    Form("blocked", blocked.forward),
    Form("ref", ref.forward, automatic=False),
)
BACKWARD = (
    Form("tpu", tpu.backward, platform="tpu", refuses=tpu.refuses),
    Form("splash", splash.backward, platform="tpu", refuses=splash.refuses),
    Form("cudnn", cudnn.backward, platform="cuda", refuses=cudnn.refuses),
    Form("gpu", gpu.backward, platform="cuda", refuses=gpu.refuses),
    Form("blocked", blocked.backward),
    Form("ref", _ref_backward, automatic=False),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(call: Call, impl: str | None, q, k, v, q_lengths, kv_lengths, slopes) -> Any:
    return dispatch("flash", FORWARD, call, q, k, v, q_lengths, kv_lengths, slopes, impl=impl)


def _flash_forward(call: Call, impl: str | None, *primals) -> Any:
    arrays = jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    out, lse = dispatch("flash", FORWARD, call, *arrays, impl=impl)
    return (out, lse), (*arrays, out, lse)


def _flash_backward(call: Call, impl: str | None, kept, cotangents) -> Any:
    used = [not isinstance(x, SymbolicZero) for x in cotangents]
    call = dataclasses.replace(call, lse_cotangent=used[1])
    whole = [x if u else jnp.zeros(x.shape, x.dtype) for x, u in zip(cotangents, used, strict=True)]
    dq, dk, dv = dispatch("flash", BACKWARD, call, *kept, *whole, impl=impl)
    return dq, dk, dv, None, None, None


# Cotangents that are known to be zero are told as such: most callers drop the log-sum-exp, and cuDNN serves only them.
_flash.defvjp(_flash_forward, _flash_backward, symbolic_zeros=True)
